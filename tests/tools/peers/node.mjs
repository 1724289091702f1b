// Broadcast server on ws: `node.mjs PORT FOLDER [deflate]`; the package is in FOLDER.

import { createRequire } from 'node:module';
import process from 'node:process';

const [port, folder, deflate] = process.argv.slice(2);
const { WebSocket, WebSocketServer } = createRequire(`${folder}/`)('ws');

const perMessageDeflate = deflate === 'deflate';
const server = new WebSocketServer({ host: '127.0.0.1', port: Number(port), backlog: 4096, perMessageDeflate });
server.on('connection', socket => {
  socket.on('error', () => {});
  socket.on('message', (data, binary) => {
    for (const client of server.clients) {
      if (client.readyState === WebSocket.OPEN) client.send(data, { binary });
    }
  });
});
