//! `serve-worker DIR`: a static web server for built sites, with the headers that isolate a page.
//!
//! Knows nothing of recipes or of how a site was made. Says where it listens as one JSON line on
//! standard output, then serves until it is interrupted.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::middleware::{Next, from_fn};
use axum::response::Response;
use clap::Parser;
use release::headers::{ALWAYS, FOR_EVER, content_type, is_hashed};
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
    let mut set = |name: &str, value: &'static str| {
        let name = HeaderName::try_from(name).expect("a header of ours");
        headers.insert(name, HeaderValue::from_static(value));
    };
    for (name, value) in ALWAYS {
        if isolated || !name.starts_with("Cross-Origin-") {
            set(name, value);
        }
    }
    let path = path.trim_start_matches('/');
    let path = if path.is_empty() { release::INDEX } else { path };
    let found = status.is_success() || status == StatusCode::NOT_MODIFIED;
    // What has no hash in its path may change with each build.
    set("cache-control", if found && is_hashed(path) { FOR_EVER } else { "no-store" });
    if found {
        set("content-type", content_type(path));
    }
}

#[cfg(test)]
mod tests;
