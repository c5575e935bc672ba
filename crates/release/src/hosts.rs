//! The same headers in the languages of other hosts, as files that lie in a site.
//!
//! Netlify and Cloudflare Pages read `_headers`, Vercel `vercel.json`; what is in `hosts/` is for
//! those who run a server themselves.

use std::fmt::Write;

use serde_json::json;

use crate::headers::{ALWAYS, ASK_AGAIN, FOR_EVER, HASHED, TYPES};

/// Where the files for servers of one's own lie.
const FOLDER: &str = "hosts/";

/// Path → text, for a site whose files without a hash in their path are these.
pub fn files(fixed: &[&str]) -> [(&'static str, String); 4] {
    [
        ("_headers", pages(fixed)),
        ("vercel.json", vercel()),
        ("hosts/nginx.conf", nginx()),
        ("hosts/Caddyfile", caddy()),
    ]
}

/// Whether a file of a site is for its host, and not for visitors.
pub fn is_for_hosts(path: &str) -> bool {
    path == "_headers" || path == "vercel.json" || path.starts_with(FOLDER)
}

/// Where two rules match, both of their values are sent: so nothing is said of one path twice.
fn pages(fixed: &[&str]) -> String {
    let mut text = String::from("/*\n");
    for (name, value) in ALWAYS {
        _ = writeln!(text, "  {name}: {value}");
    }
    for path in std::iter::once(&"").chain(fixed) {
        _ = write!(text, "/{path}\n  Cache-Control: {ASK_AGAIN}\n");
    }
    for folder in HASHED {
        _ = write!(text, "/{folder}*\n  Cache-Control: {FOR_EVER}\n");
    }
    text
}

fn vercel() -> String {
    let header = |(key, value): (&str, &str)| json!({"key": key, "value": value});
    let folders = HASHED.map(|folder| folder.trim_end_matches('/')).join("|");
    let mut all = ALWAYS.map(header).to_vec();
    all.push(header(("Cache-Control", ASK_AGAIN)));
    let rules = json!({"headers": [
        {"source": "/(.*)", "headers": all},
        {"source": format!("/({folders})/(.*)"), "headers": [header(("Cache-Control", FOR_EVER))]},
    ]});
    format!("{rules:#}\n")
}

/// A `location` with an `add_header` of its own has none of those around it, so each says all.
fn nginx() -> String {
    let always: String = ALWAYS
        .iter()
        .map(|(name, value)| format!("    add_header {name} \"{value}\" always;\n"))
        .collect();
    let types: String =
        TYPES.iter().map(|(ending, kind)| format!("    \"{kind}\" {ending};\n")).collect();
    let folders = HASHED.map(|folder| folder.trim_end_matches('/')).join("|");
    format!(
        "# Inside `server {{ … }}`, whose `root` is the site's folder.\n\
         types {{\n{types}}}\n\
         default_type application/octet-stream;\n\
         location / {{\n{always}    add_header Cache-Control \"{ASK_AGAIN}\" always;\n}}\n\
         location ~ ^/({folders})/ {{\n{always}    add_header Cache-Control \"{FOR_EVER}\";\n}}\n"
    )
}

fn caddy() -> String {
    let always: String =
        ALWAYS.iter().map(|(name, value)| format!("    {name} \"{value}\"\n")).collect();
    let folders = HASHED.map(|folder| format!("/{folder}*")).join(" ");
    format!(
        "# Inside a site's block, beside `root` and `file_server`.\n\
         @hashed path {folders}\n@others not path {folders}\n\
         header {{\n{always}}}\n\
         header @hashed Cache-Control \"{FOR_EVER}\"\n\
         header @others Cache-Control \"{ASK_AGAIN}\"\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_host_is_told_everything() {
        for (path, text) in files(&["index.html"]) {
            assert!(is_for_hosts(path), "{path}");
            for (name, value) in ALWAYS {
                assert!(text.contains(name) && text.contains(value), "{path} lacks {name}");
            }
            for folder in HASHED {
                assert!(text.contains(folder.trim_end_matches('/')), "{path} lacks {folder}");
            }
            assert!(text.contains(FOR_EVER) && text.contains(ASK_AGAIN), "{path}");
        }
    }

    #[test]
    fn each_location_of_nginx_says_all() {
        let nginx = nginx();
        for (name, _) in ALWAYS {
            assert_eq!(nginx.matches(name).count(), 2, "{name}");
        }
    }
}
