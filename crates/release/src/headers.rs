//! The headers of each path of a site: what isolates the page, how long it is kept, what it is.
//!
//! `serve`, `publish` and the files for other hosts all have them from here.

/// What every response has, scripts of workers too: without it a page has no shared memory, and the
/// model one thread.
pub const ALWAYS: [(&str, &str); 4] = [
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Embedder-Policy", "require-corp"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("X-Content-Type-Options", "nosniff"),
];

/// Folders whose files bear a hash in their path: the same path is the same bytes for ever.
pub const HASHED: [&str; 4] = ["assets/", "models/", "vendor/", "releases/"];

/// How long what is hashed is kept.
pub const FOR_EVER: &str = "public, max-age=31536000, immutable";
/// All else is asked for each time.
pub const ASK_AGAIN: &str = "no-cache";

/// Whether the path, relative to the site, names its bytes.
pub fn is_hashed(path: &str) -> bool {
    HASHED.iter().any(|folder| path.starts_with(folder))
}

pub fn cache_control(path: &str) -> &'static str {
    if is_hashed(path) { FOR_EVER } else { ASK_AGAIN }
}

/// Endings and their types. Scripts and WebAssembly do not run without theirs.
pub const TYPES: [(&str, &str); 13] = [
    ("css", "text/css; charset=utf-8"),
    ("html", "text/html; charset=utf-8"),
    ("jpg", "image/jpeg"),
    ("js", "text/javascript; charset=utf-8"),
    ("json", "application/json"),
    ("mjs", "text/javascript; charset=utf-8"),
    ("onnx", "application/octet-stream"),
    ("png", "image/png"),
    ("svg", "image/svg+xml"),
    ("txt", "text/plain; charset=utf-8"),
    ("wasm", "application/wasm"),
    ("webp", "image/webp"),
    ("woff2", "font/woff2"),
];

pub fn content_type(path: &str) -> &'static str {
    let name = path.rsplit('/').next().unwrap_or_default();
    let ending = name.rsplit_once('.').map_or("", |(_, ending)| ending);
    let known = TYPES.iter().find(|(known, _)| *known == ending);
    known.map_or("application/octet-stream", |(_, kind)| kind)
}

/// Whether compression is worth its while.
pub fn compresses(path: &str) -> bool {
    let kind = content_type(path);
    kind.starts_with("text/")
        || ["application/json", "application/wasm", "image/svg+xml"].contains(&kind)
}

/// What is wrong with how long a response says that it may be kept.
pub fn misses_caching(path: &str, said: Option<&str>) -> Option<String> {
    let said = said.unwrap_or_default();
    let words: Vec<String> = said.split(',').map(|word| word.trim().to_lowercase()).collect();
    let has = |word: &str| words.iter().any(|w| w == word);
    let age = words.iter().find_map(|w| w.strip_prefix("max-age=")?.parse::<u64>().ok());
    let fine = if is_hashed(path) {
        // A host that says a day or more has understood.
        age.is_some_and(|seconds| seconds >= 86_400) && !has("no-cache") && !has("no-store")
    } else {
        has("no-cache") || has("no-store") || age == Some(0)
    };
    (!fine).then(|| format!("cache-control: `{said}`, expected `{}`", cache_control(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_have_their_types() {
        for (path, kind) in [
            ("index.html", "text/html; charset=utf-8"),
            ("vendor/1f/ort.mjs", "text/javascript; charset=utf-8"),
            ("vendor/1f/ort.wasm", "application/wasm"),
            ("models/1f2e.onnx", "application/octet-stream"),
            ("models/1f2e", "application/octet-stream"),
            ("assets.d/x", "application/octet-stream"),
        ] {
            assert_eq!(content_type(path), kind, "{path}");
        }
        assert!(compresses("a/b.wasm") && !compresses("models/1f2e") && !compresses("a.png"));
    }

    #[test]
    fn caching_is_judged_by_what_it_means() {
        for (path, said, fine) in [
            ("index.html", Some("no-cache"), true),
            ("index.html", Some("no-store"), true),
            ("index.html", Some("public, max-age=0, must-revalidate"), true),
            ("index.html", Some("public, max-age=600"), false),
            ("index.html", None, false),
            ("assets/a.1f.js", Some(FOR_EVER), true),
            ("assets/a.1f.js", Some("max-age=86400"), true),
            ("assets/a.1f.js", Some("no-cache"), false),
            ("assets/a.1f.js", None, false),
        ] {
            assert_eq!(misses_caching(path, said).is_none(), fine, "{path}: {said:?}");
        }
    }
}
