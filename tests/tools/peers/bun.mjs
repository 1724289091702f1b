// Broadcast server with Bun's WebSocket server: `bun.mjs PORT [deflate] [CERTIFICATE.pem]`.

const [port, ...options] = process.argv.slice(2);
const perMessageDeflate = options.includes('deflate');
const [pem] = options.filter(option => option.endsWith('.pem')).map(option => Bun.file(option));

const server = Bun.serve({
  hostname: '127.0.0.1',
  port: Number(port),
  tls: pem && { cert: pem, key: pem },
  fetch: (request, server) => (server.upgrade(request) ? undefined : new Response('WebSocket only\n', { status: 426 })),
  websocket: {
    perMessageDeflate,
    idleTimeout: 0,
    sendPings: false,
    backpressureLimit: 64 * 2 ** 20, // above it, Bun would lose messages
    open: socket => socket.subscribe('all'),
    message: (socket, message) => server.publish('all', message, perMessageDeflate),
  },
});
