// Tiles of one pyramid: which level suits a zoom, what is loaded, what comes next.
// Knows no classes and no page.

const AT_ONCE = 6;
const RETRY_MS = 8000;

export class Pyramid {
  /**
   * levels: [{size: [w, h], downsample: [x, y]}], the finest first, in level-0 pixels.
   * load(level, column, row, width, height): a promise of what a tile is drawn from.
   * changed(): called when a tile has come or failed; failed(error) before that.
   */
  constructor({levels, tilePx, keep, load, release, changed, failed}) {
    Object.assign(this, {levels, tilePx, keep, load, release, changed, failed});
    this.tiles = new Map();
    this.loading = 0;
    this.tick = 0;
  }

  /** The coarsest level that is as fine as the screen, for `scale` screen pixels a level-0 pixel. */
  levelFor(scale) {
    let best = 0;
    this.levels.forEach((level, index) => {
      if (Math.max(...level.downsample) * scale <= 1.2) best = index;
    });
    return best;
  }

  /** Tiles of a level that meet a box in level-0 pixels. */
  * inside(index, box) {
    const {size, downsample: [dx, dy]} = this.levels[index];
    const first = (v, d) => Math.max(0, Math.floor(v / d / this.tilePx));
    const last = (v, d, n) => Math.min(Math.ceil(n / this.tilePx) - 1,
      Math.floor(v / d / this.tilePx));
    for (let row = first(box.top, dy); row <= last(box.bottom, dy, size[1]); row += 1) {
      for (let column = first(box.left, dx); column <= last(box.right, dx, size[0]); column += 1) {
        const width = Math.min(this.tilePx, size[0] - column * this.tilePx);
        const height = Math.min(this.tilePx, size[1] - row * this.tilePx);
        const left = column * this.tilePx * dx, top = row * this.tilePx * dy;
        yield {level: index, column, row, width, height, left, top,
          right: left + width * dx, bottom: top + height * dy};
      }
    }
  }

  /** What is there to draw of a box, coarse before fine; what is missing starts to load. */
  visible(scale, box) {
    if (!this.levels.length) return [];
    this.tick += 1;
    const fine = this.levelFor(scale), coarse = this.levels.length - 1;
    const [x, y] = [(box.left + box.right) / 2, (box.top + box.bottom) / 2];
    const far = (t) => Math.hypot((t.left + t.right) / 2 - x, (t.top + t.bottom) / 2 - y);
    const wanted = [...this.inside(fine, box)].sort((a, b) => far(a) - far(b));
    this.start(coarse === fine ? wanted : [...this.inside(coarse, box), ...wanted]);
    const found = [];
    for (let level = coarse; level >= fine; level -= 1) {
      for (const place of this.inside(level, box)) {
        const tile = this.tiles.get(key(place));
        if (!tile) continue;
        tile.used = this.tick;
        if (tile.content || tile.broken) found.push(tile);
      }
    }
    this.forget();
    return found;
  }

  /** The tile of the finest level loaded that holds a place, or undefined. */
  at(scale, x, y) {
    for (let level = this.levelFor(scale); level < this.levels.length; level += 1) {
      for (const place of this.inside(level, {left: x, right: x, top: y, bottom: y})) {
        const tile = this.tiles.get(key(place));
        if (tile?.content) return tile;
      }
    }
    return undefined;
  }

  /** Whether nothing is on its way. */
  get idle() {
    return this.loading === 0;
  }

  start(places) {
    for (const place of places) {
      if (this.loading >= AT_ONCE) return;
      const name = key(place), old = this.tiles.get(name);
      if (old && !(old.broken && Date.now() > old.retry)) continue;
      const tile = {...place, used: this.tick, content: null, broken: false};
      this.tiles.set(name, tile);
      this.fetch(tile);
    }
  }

  async fetch(tile) {
    this.loading += 1;
    try {
      tile.content = await this.load(tile);
    } catch (error) {
      tile.broken = true;
      tile.retry = Date.now() + RETRY_MS;
      this.failed(error);
    }
    this.loading -= 1;
    this.changed();
  }

  forget() {
    const over = this.tiles.size - this.keep;
    if (over <= 0) return;
    const last = this.levels.length - 1;
    const old = [...this.tiles].filter(([, t]) => t.used < this.tick && t.level !== last
      && (t.content || t.broken)).sort((a, b) => a[1].used - b[1].used);
    for (const [name, tile] of old.slice(0, over)) {
      this.tiles.delete(name);
      if (tile.content) this.release(tile.content);
    }
  }
}

function key(place) {
  return `${place.level}/${place.column}/${place.row}`;
}
