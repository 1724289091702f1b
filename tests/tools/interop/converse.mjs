// The conversation of all JavaScript clients: send each message, wait until it has come back, close.
//
// A message is a list of pieces, its fragments. Pieces and received messages are {text} or {base64}.

export async function converse(open, conversation) {
  const { socket, send } = open();
  socket.binaryType = 'arraybuffer';
  const closed = event(socket, 'close');
  await event(socket, 'open');
  const echoes = [];
  for (const pieces of conversation) {
    const echo = event(socket, 'message');
    send(pieces.map(decode));
    echoes.push(encode((await echo).data));
  }
  socket.close(1000, 'done');
  const { code, wasClean } = await closed;
  return { echoes, code, wasClean };
}

// The standard WebSocket sends only whole messages.
export function standard(socket) {
  return { socket, send: pieces => socket.send(join(pieces)) };
}

function join(pieces) {
  if (pieces.length === 1) return pieces[0];
  if (typeof pieces[0] === 'string') return pieces.join('');
  const whole = new Uint8Array(pieces.reduce((size, piece) => size + piece.length, 0));
  let position = 0;
  for (const piece of pieces) {
    whole.set(piece, position);
    position += piece.length;
  }
  return whole;
}

// The next event of a kind; an unexpected end of the connection is an error.
function event(socket, kind) {
  return new Promise((resolve, reject) => {
    socket.addEventListener(kind, resolve, { once: true });
    if (kind !== 'close') socket.addEventListener('close', ({ code }) => reject(new Error(`closed: ${code}`)), { once: true });
  });
}

function decode({ text, base64 }) {
  return base64 === undefined ? text : Uint8Array.from(atob(base64), character => character.charCodeAt(0));
}

function encode(data) {
  if (typeof data === 'string') return { text: data };
  const bytes = new Uint8Array(data);
  let binary = '';
  for (let i = 0; i < bytes.length; i += 4096) binary += String.fromCharCode(...bytes.subarray(i, i + 4096));
  return { base64: btoa(binary) };
}
