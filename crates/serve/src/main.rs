//! `serve-worker DIR`: a static web server for built sites, with the headers that isolate a page.
//!
//! Knows nothing of recipes or of how a site was made. Says where it listens as one JSON line on
//! standard output, then serves until it is interrupted.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use axum::Router;
use axum::extract::Request;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{Next, from_fn};
use axum::response::Response;
use clap::Parser;
use tokio::net::TcpListener;
use tower_http::services::ServeDir;

/// Serves a built site.
#[derive(Debug, Parser)]
struct Cli {
    /// The site's folder.
    dir: PathBuf,
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// 0 takes any free one.
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Leave out the headers that isolate a page, as many hosts do.
    #[arg(long)]
    no_isolation: bool,
}

/// What cannot be served, and what to do about it.
#[derive(Debug, PartialEq)]
struct Refusal {
    code: u8,
    message: String,
    hint: &'static str,
}

const INPUT: u8 = 1;
const ENVIRONMENT: u8 = 2;

#[tokio::main]
async fn main() -> ExitCode {
    match run(Cli::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(Refusal { code, message, hint }) => {
            eprintln!("error: {message}\nhint: {hint}");
            ExitCode::from(code)
        }
    }
}

async fn run(cli: Cli) -> Result<(), Refusal> {
    let site = site(&cli.dir, !cli.no_isolation)?;
    let listener = TcpListener::bind((cli.host.as_str(), cli.port)).await.map_err(|e| Refusal {
        code: ENVIRONMENT,
        message: format!("cannot listen on {}:{}: {e}", cli.host, cli.port),
        hint: "choose another port with --port, or 0 for any free one",
    })?;
    let address = listener.local_addr().map_err(broken)?;
    println!("{}", serde_json::json!({"listening": url(&cli.host, address)}));
    axum::serve(listener, site).with_graceful_shutdown(interrupted()).await.map_err(broken)
}

fn broken(error: std::io::Error) -> Refusal {
    Refusal {
        code: ENVIRONMENT,
        message: format!("the server stopped: {error}"),
        hint: "start it again",
    }
}

/// The name that was asked for: browsers isolate `localhost` and `127.0.0.1` without TLS, and
/// nothing else.
fn url(host: &str, address: SocketAddr) -> String {
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_string() };
    format!("http://{host}:{}", address.port())
}

async fn interrupted() {
    let interrupt = tokio::signal::ctrl_c();
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate()).expect("signals can be waited for");
        tokio::select! { _ = interrupt => {}, _ = terminate.recv() => {} }
    }
    #[cfg(not(unix))]
    let _ = interrupt.await;
}

/// The site in `dir` as a service.
fn site(dir: &Path, isolated: bool) -> Result<Router, Refusal> {
    if !dir.join("index.html").is_file() {
        return Err(Refusal {
            code: INPUT,
            message: format!("{} has no index.html: it is no site", dir.display()),
            hint: "name a built site, for example artifacts/demo/site",
        });
    }
    let files = ServeDir::new(dir);
    Ok(Router::new().fallback_service(files).layer(from_fn(
        move |request: Request, next: Next| async move {
            let path = request.uri().path().to_string();
            let mut response: Response = next.run(request).await;
            let status = response.status();
            decorate(response.headers_mut(), status, &path, isolated);
            response
        },
    )))
}

fn decorate(headers: &mut HeaderMap, status: StatusCode, path: &str, isolated: bool) {
    let mut set = |name: HeaderName, value: &'static str| {
        headers.insert(name, HeaderValue::from_static(value));
    };
    if isolated {
        set(HeaderName::from_static("cross-origin-opener-policy"), "same-origin");
        set(HeaderName::from_static("cross-origin-embedder-policy"), "require-corp");
        set(HeaderName::from_static("cross-origin-resource-policy"), "same-origin");
    }
    set(X_CONTENT_TYPE_OPTIONS, "nosniff");
    set(CACHE_CONTROL, cache_control(status, path));
    if (status.is_success() || status == StatusCode::NOT_MODIFIED)
        && let Some(kind) = content_type(path)
    {
        set(CONTENT_TYPE, kind);
    }
}

/// What bears its hash in its name never changes; what does not may change with each build.
fn cache_control(status: StatusCode, path: &str) -> &'static str {
    let hashed = ["/assets/", "/models/", "/vendor/"].iter().any(|p| path.starts_with(p));
    let found = status.is_success() || status == StatusCode::NOT_MODIFIED;
    if hashed && found { "public, max-age=31536000, immutable" } else { "no-store" }
}

/// The types that a page does not work without; the others are guessed well enough.
fn content_type(path: &str) -> Option<&'static str> {
    let name = path.rsplit('/').next().unwrap_or_default();
    Some(match name.rsplit_once('.')?.1 {
        "js" | "mjs" => "text/javascript",
        "wasm" => "application/wasm",
        "json" => "application/json",
        "onnx" | "onnx_data" => "application/octet-stream",
        _ => return None,
    })
}

#[cfg(test)]
mod tests;
