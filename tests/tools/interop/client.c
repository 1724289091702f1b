/* Sends messages with libwebsockets, and prints what comes back: client PORT OFFER

   OFFER is an offer of permessage-deflate, or empty. Standard input has one message after another: t for text or
   b for binary, the length in bytes, a line feed, and the payload. The echoes have the same form on standard output. */

#include <libwebsockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LIMIT = 2 << 20 }; /* bytes of a message */

static struct lws_context *context;
static struct lws *connection;
static unsigned char *buffer;
static char *echo;
static size_t length, received;
static char kind;
static int waiting, done; /* waiting: a message is to be sent */

/* Read the next message. Return 0 after the last one. */
static int next_message(void)
{
    waiting = 1;
    if (scanf("%c%zu", &kind, &length) != 2 || length > LIMIT || getchar() != '\n')
        return 0;
    return fread(buffer + LWS_PRE, 1, length, stdin) == length;
}

static int callback(struct lws *wsi, enum lws_callback_reasons reason, void *user, void *in, size_t size)
{
    switch (reason) {
    case LWS_CALLBACK_CLIENT_ESTABLISHED:
        if (next_message())
            lws_callback_on_writable(wsi);
        break;
    case LWS_CALLBACK_CLIENT_WRITEABLE: /* also called when the rest of a message is sent */
        if (!waiting)
            break;
        waiting = 0;
        if (!kind) {
            lws_close_reason(wsi, 1000, NULL, 0);
            return -1;
        }
        if (lws_write(wsi, buffer + LWS_PRE, length, kind == 't' ? LWS_WRITE_TEXT : LWS_WRITE_BINARY) < 0)
            return -1;
        break;
    case LWS_CALLBACK_CLIENT_RECEIVE:
        if (received + size > LIMIT)
            return -1;
        memcpy(echo + received, in, size);
        received += size;
        if (!lws_is_final_fragment(wsi) || lws_remaining_packet_payload(wsi))
            break;
        printf("%c%zu\n", lws_frame_is_binary(wsi) ? 'b' : 't', received);
        fwrite(echo, 1, received, stdout);
        received = 0;
        if (!next_message())
            kind = 0;
        lws_callback_on_writable(wsi);
        break;
    case LWS_CALLBACK_CLIENT_CONNECTION_ERROR:
        fprintf(stderr, "no connection: %s\n", in ? (char *)in : "");
        done = 1;
        break;
    case LWS_CALLBACK_CLIENT_CLOSED:
        done = 1;
        break;
    default:
        break;
    }
    return 0;
}

int main(int count, char **arguments)
{
    struct lws_protocols protocols[] = {{"", callback, 0, 65536, 0, NULL, 0}, {NULL, NULL, 0, 0, 0, NULL, 0}};
    struct lws_extension extensions[] = {
        {"permessage-deflate", lws_extension_callback_pm_deflate, NULL}, {NULL, NULL, NULL}};
    struct lws_context_creation_info info = {0};
    struct lws_client_connect_info how = {0};

    buffer = malloc(LWS_PRE + LIMIT);
    echo = malloc(LIMIT);
    if (count != 3 || !buffer || !echo)
        return 1;
    extensions[0].client_offer = arguments[2];
    lws_set_log_level(LLL_ERR | LLL_WARN, NULL);
    info.port = CONTEXT_PORT_NO_LISTEN;
    info.protocols = protocols;
    info.extensions = *arguments[2] ? extensions : NULL;
    context = lws_create_context(&info);
    how.context = context;
    how.address = how.host = "localhost";
    how.port = atoi(arguments[1]);
    how.path = "/";
    how.pwsi = &connection;
    if (!context || !lws_client_connect_via_info(&how))
        return 1;
    while (!done && lws_service(context, 0) >= 0)
        ;
    lws_context_destroy(context);
    return 0;
}
