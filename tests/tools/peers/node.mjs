// Broadcast server with ws: `node.mjs FOLDER PORT [deflate] [CERTIFICATE.pem]`; the package is in FOLDER.

import { readFileSync } from 'node:fs';
import http from 'node:http';
import https from 'node:https';
import { createRequire } from 'node:module';
import process from 'node:process';

const [folder, port, ...options] = process.argv.slice(2);
const { WebSocket, WebSocketServer } = createRequire(`${folder}/`)('ws');

const [pem] = options.filter(option => option.endsWith('.pem')).map(option => readFileSync(option));
const listener = pem ? https.createServer({ cert: pem, key: pem }) : http.createServer();
const server = new WebSocketServer({ server: listener, perMessageDeflate: options.includes('deflate') });
server.on('connection', socket => {
  socket.on('error', () => {});
  socket.on('message', (data, binary) => {
    for (const client of server.clients) {
      if (client.readyState === WebSocket.OPEN) client.send(data, { binary });
    }
  });
});
listener.listen({ host: '127.0.0.1', port: Number(port), backlog: 4096 });
