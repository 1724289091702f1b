/* A minimal broadcast server, for comparison: recv(2), and send(2) to each client.
 *
 *     loop PORT [deflate]
 *
 * Each handshake gets the same response, nothing is checked, and a client that does not read delays all others.
 * Data of a client is unmasked in place, and sent as it is.
 */
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define CLIENTS 65536
#define ROOM (8u << 20) /* bytes of a client's buffer: the longest frame */

static struct client {
    unsigned char *data;
    size_t used;
    int place, open; /* place in the list; whether its handshake is over */
} clients[CLIENTS];
static int list[CLIENTS], many;
static const char *extension = "";

static void leave(int fd) {
    list[clients[fd].place] = list[--many];
    clients[list[many]].place = clients[fd].place;
    free(clients[fd].data);
    close(fd);
}

static void answer(int fd) {
    char text[400];
    int size = sprintf(text,
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n%s\r\n", extension);
    send(fd, text, size, MSG_NOSIGNAL);
}

/* Send a masked frame to all clients, unmasked in place; return its length, or 0 if it is incomplete. */
static size_t serve(unsigned char *frame, size_t size) {
    if (size < 2) return 0;
    size_t head = 2 + ((frame[1] & 127) == 126 ? 2 : (frame[1] & 127) == 127 ? 8 : 0), length = frame[1] & 127;
    if (size < head + 4) return 0;
    if (head > 2) {
        length = 0;
        for (size_t i = 2; i < head; i++) length = length << 8 | frame[i];
    }
    if (size < head + 4 + length) return 0;
    unsigned char key[4], *payload = frame + head + 4;
    memcpy(key, frame + head, 4);
    for (size_t i = 0; i < length; i++) payload[i] ^= key[i & 3];
    memmove(frame + 4, frame, head);
    frame[5] &= 127;
    for (int i = 0; i < many; i++)
        for (size_t sent = 0; sent < head + length;) {
            ssize_t more = send(list[i], frame + 4 + sent, head + length - sent, MSG_NOSIGNAL);
            if (more < 0) break;
            sent += more;
        }
    return head + 4 + length;
}

static void receive(int fd) {
    struct client *c = &clients[fd];
    ssize_t more = recv(fd, c->data + c->used, ROOM - c->used, 0);
    if (more <= 0 || (c->open && !c->used && c->data[0] == 0x88)) { /* nothing more, or a Close */
        leave(fd);
        return;
    }
    c->used += more;
    if (!c->open) {
        if (c->used < 4 || memcmp(c->data + c->used - 4, "\r\n\r\n", 4)) return;
        answer(fd);
        c->open = 1, c->used = 0;
        return;
    }
    size_t at = 0, size;
    while ((size = serve(c->data + at, c->used - at))) at += size;
    memmove(c->data, c->data + at, c->used -= at);
}

int main(int argc, char **argv) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct epoll_event events[256], event = {.events = EPOLLIN};
    int on = 1, listener = socket(AF_INET, SOCK_STREAM, 0), poll = epoll_create1(0);
    if (argc < 2) return 2;
    if (argc > 2) extension = "Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover\r\n";
    address.sin_port = htons(atoi(argv[1]));
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (void *)&address, sizeof address) || listen(listener, 4096)) {
        perror("loop");
        return 1;
    }
    event.data.fd = listener;
    epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int ready = epoll_wait(poll, events, 256, -1);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (fd != listener) {
                receive(fd);
                continue;
            }
            if ((fd = accept(listener, 0, 0)) < 0 || fd >= CLIENTS) continue;
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
            clients[fd] = (struct client){.data = malloc(ROOM), .place = many};
            list[many++] = fd;
            event.data.fd = fd;
            epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
        }
    }
}
