// Where the topology's items stand. Pure: peers and a size in, items with places out. The same peers always stand in the
// same places, so that a live picture does not jump.
//
// An item is {key, peers, span, x, y, w, h}: one peer, or several that stand together where there are too many to tell
// apart.

const LANE_PX = 22;
const GAP_PX = 6;
const MAX_ITEMS = 90;

const order = (one, other) =>
  one.span[0] - other.span[0] || one.span[1] - other.span[1] || (one.key < other.key ? -1 : 1);

/** One item per span of a peer; where those are too many, peers with about the same span become one item. */
function grouped(rows) {
  const alone = rows.flatMap((row) =>
    row.spans.map((span) => ({ key: `${row.peer_id} ${span[0]}`, peers: [row], span })),
  );
  for (let step = 1, items = alone; ; step *= 2) {
    if (items.length <= MAX_ITEMS) return items.sort(order);
    const groups = new Map();
    for (const item of alone) {
      const key = item.span.map((at) => Math.round(at / step)).join(":");
      const group = groups.get(key);
      if (group) {
        group.peers.push(item.peers[0]);
        group.span = [Math.min(group.span[0], item.span[0]), Math.max(group.span[1], item.span[1])];
      } else groups.set(key, { key: `group ${step} ${key}`, peers: [item.peers[0]], span: [...item.span] });
    }
    items = [...groups.values()];
    if (step > 4096) return items.sort(order);
  }
}

/** As bars over the model's blocks, in as few lanes as hold them. Returns {items, height}. */
export function byBlocks(rows, numBlocks, width) {
  const left = width < 500 ? 36 : 56;
  const scale = (width - 2 * left) / Math.max(1, numBlocks);
  const lanes = [];
  const items = grouped(rows).map((item) => {
    const x = left + item.span[0] * scale;
    const w = Math.max(10, (item.span[1] - item.span[0]) * scale - 3);
    let lane = lanes.findIndex((end) => end <= x);
    if (lane < 0) lane = lanes.push(0) - 1;
    lanes[lane] = x + w;
    return { ...item, x, w, y: 36 + lane * (LANE_PX + GAP_PX), h: LANE_PX };
  });
  return { items, height: Math.max(160, 36 + lanes.length * (LANE_PX + GAP_PX) + 28), left, scale };
}

/** As points whose distance is the round trip that their network coordinates predict. Peers without one stand apart. */
export function byDistance(rows, places, width, height) {
  const margin = 48;
  const known = rows.filter((row) => places.get(row.peer_id));
  const xs = known.map((row) => places.get(row.peer_id)[0]);
  const ys = known.map((row) => places.get(row.peer_id)[1]);
  const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const scale = Math.min(
    (width - 2 * margin) / Math.max(right - left, 1e-4),
    (height - 2 * margin) / Math.max(bottom - top, 1e-4),
  );
  const middle = [(left + right) / 2, (top + bottom) / 2];
  const cell = known.length > MAX_ITEMS ? 44 : 1;
  const groups = new Map();
  const add = (key, row, x, y) => {
    const group = groups.get(key);
    if (group) {
      group.peers.push(row);
      group.x += (x - group.x) / group.peers.length;
      group.y += (y - group.y) / group.peers.length;
    } else groups.set(key, { key: `place ${key}`, peers: [row], x, y });
  };
  for (const row of known) {
    const [px, py] = places.get(row.peer_id);
    const x = width / 2 + (px - middle[0]) * scale;
    const y = height / 2 + (py - middle[1]) * scale;
    add(cell === 1 ? row.peer_id : `${Math.round(x / cell)}:${Math.round(y / cell)}`, row, x, y);
  }
  const nowhere = rows.filter((row) => !places.get(row.peer_id));
  nowhere.forEach((row, at) => {
    const many = nowhere.length > 24;
    add(
      many ? "nowhere" : row.peer_id,
      row,
      many ? width / 2 : margin + (at + 0.5) * ((width - 2 * margin) / nowhere.length),
      height - 20,
    );
  });
  const items = [...groups.values()].map((item) => {
    const r = 8 + Math.min(18, 3 * Math.log2(item.peers.length));
    return { ...item, w: 2 * r, h: 2 * r };
  });
  apart(items, width, height);
  for (const item of items) {
    item.x -= item.w / 2;
    item.y -= item.h / 2;
  }
  return { items, scale };
}

/** Push items that lie on one another apart, a little at a time; always in the same way. */
function apart(items, width, height) {
  for (let round = 0; round < 40; round += 1) {
    let moved = false;
    for (let one = 0; one < items.length; one += 1) {
      for (let other = one + 1; other < items.length; other += 1) {
        const [a, b] = [items[one], items[other]];
        let [dx, dy] = [b.x - a.x, b.y - a.y];
        const least = (a.w + b.w) / 2 + 14;
        let distance = Math.hypot(dx, dy);
        if (distance >= least) continue;
        if (distance < 0.01) [dx, dy, distance] = [Math.cos(other * 2.4), Math.sin(other * 2.4), 1];
        const push = (least - Math.min(distance, least)) / 2 + 0.5;
        a.x -= (dx / distance) * push;
        a.y -= (dy / distance) * push;
        b.x += (dx / distance) * push;
        b.y += (dy / distance) * push;
        moved = true;
      }
    }
    if (!moved) break;
  }
  for (const item of items) {
    item.x = Math.min(width - item.w / 2 - 4, Math.max(item.w / 2 + 4, item.x));
    item.y = Math.min(height - item.h / 2 - 4, Math.max(item.h / 2 + 4, item.y));
  }
}
