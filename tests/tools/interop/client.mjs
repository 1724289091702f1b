// A client outside browsers: `client.mjs URL [own | plain | ws | ws-plain [FOLDER]]`.
//
// own is the runtime's WebSocket, plain the same without compression; ws is the package of that name in FOLDER.
// The conversation comes from standard input, the report goes to standard output, both as JSON.

import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import process from 'node:process';

import { converse, standard } from './converse.mjs';

const [url, kind, folder] = process.argv.slice(2);

function openPackage(perMessageDeflate) {
  const WebSocket = createRequire(`${folder}/`)('ws');
  const socket = new WebSocket(url, { perMessageDeflate });
  const send = pieces => pieces.forEach((piece, i) => socket.send(piece, { fin: i === pieces.length - 1 }));
  return { socket, send };
}

const open = {
  own: () => standard(new WebSocket(url)),
  plain: () => standard(new WebSocket(url, { perMessageDeflate: false })),
  ws: () => openPackage(true),
  'ws-plain': () => openPackage(false),
}[kind];

const result = await converse(open, JSON.parse(readFileSync(0, 'utf8')));
process.stdout.write(JSON.stringify(result));
