// What the page remembers in the browser's storage: that it is loading, so that a tab which dies of
// it does not do so for ever. iOS reloads such a tab by itself.

// Storage may be switched off, and then throws.
export function read(storage, key) {
  try {
    return storage().getItem(key);
  } catch {
    return null;
  }
}

export function write(storage, key, value) {
  try {
    if (value === null) storage().removeItem(key);
    else storage().setItem(key, value);
  } catch {
    // Then it is not remembered.
  }
}

const local = () => localStorage;
const KEY = 'anneal:loading';
const DAY = 24 * 3600_000;

/** Set while a model loads. A tab that is left clears it; one that is killed cannot. */
export const mark = {
  set() {
    write(local, KEY, String(Date.now()));
    addEventListener('pagehide', mark.clear);
  },
  clear() {
    write(local, KEY, null);
    removeEventListener('pagehide', mark.clear);
  },
  /** Whether a page died under it; asking clears it. */
  died() {
    const at = Number(read(local, KEY));
    mark.clear();
    return at > 0 && Date.now() - at < DAY;
  },
};
