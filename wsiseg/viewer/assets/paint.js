// Labels to colours. Knows no places and no page.

/** The colours of the classes that are shown, by label; 0 stands for nothing to draw. */
export function palette(classes, shown) {
  const table = new Uint32Array(256);
  const bytes = new Uint8ClampedArray(table.buffer);
  for (const {value, color} of classes) {
    if (shown.has(value)) bytes.set([...color, 255], 4 * value);
  }
  return table;
}

/** A canvas with the labels of a tile in the colours of a palette, as areas or as outlines. */
export function paint(labels, width, height, colours, outline) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const image = new ImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  for (let i = 0; i < labels.length; i += 1) pixels[i] = colours[labels[i]];
  if (outline) clearInside(labels, pixels, width, height);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** Clear all pixels whose four neighbours in the tile have the same label. */
function clearInside(labels, pixels, width, height) {
  for (let y = 0, i = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1, i += 1) {
      const own = labels[i];
      const same = (x === 0 || labels[i - 1] === own)
        && (x === width - 1 || labels[i + 1] === own)
        && (y === 0 || labels[i - width] === own)
        && (y === height - 1 || labels[i + width] === own);
      if (same) pixels[i] = 0;
    }
  }
}
