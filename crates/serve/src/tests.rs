//! The server as a browser sees it, without a socket.

use axum::body::{Body, to_bytes};
use axum::http::Method;
use tower::ServiceExt;

use super::*;

const IMMUTABLE: &str = "public, max-age=31536000, immutable";

fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (path, text) in [
        ("index.html", "<!doctype html>"),
        ("site.json", "{}"),
        ("assets/main.1f396ee0.js", "export {}"),
        ("vendor/bf86db2234e8ab83/ort.mjs", "export {}"),
        ("vendor/bf86db2234e8ab83/ort.wasm", "\0asm"),
        ("models/llama-72263b3aca0a1496/onnx/model_q4.onnx_data", "0123456789"),
    ] {
        let path = dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    dir
}

async fn get(isolated: bool, method: Method, path: &str, range: Option<&str>) -> Response {
    let dir = folder();
    let mut request = Request::builder().method(method).uri(path);
    if let Some(range) = range {
        request = request.header("range", range);
    }
    let request = request.body(Body::empty()).unwrap();
    let response = site(dir.path(), isolated).unwrap().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    // Read while the folder is there.
    Response::from_parts(parts, Body::from(to_bytes(body, 1 << 20).await.unwrap()))
}

fn header<'a>(response: &'a Response, name: &str) -> &'a str {
    response.headers().get(name).map_or("", |v| v.to_str().unwrap())
}

#[tokio::test]
async fn types_and_caching_are_those_a_page_needs() {
    for (path, kind, cache) in [
        ("/", "text/html; charset=utf-8", "no-store"),
        ("/index.html", "text/html; charset=utf-8", "no-store"),
        ("/site.json", "application/json", "no-store"),
        ("/assets/main.1f396ee0.js", "text/javascript; charset=utf-8", IMMUTABLE),
        ("/vendor/bf86db2234e8ab83/ort.mjs", "text/javascript; charset=utf-8", IMMUTABLE),
        ("/vendor/bf86db2234e8ab83/ort.wasm", "application/wasm", IMMUTABLE),
        (
            "/models/llama-72263b3aca0a1496/onnx/model_q4.onnx_data",
            "application/octet-stream",
            IMMUTABLE,
        ),
    ] {
        let response = get(true, Method::GET, path, None).await;
        assert_eq!(response.status(), 200, "{path}");
        assert_eq!(header(&response, "content-type"), kind, "{path}");
        assert_eq!(header(&response, "cache-control"), cache, "{path}");
        assert_eq!(header(&response, "cross-origin-opener-policy"), "same-origin", "{path}");
        assert_eq!(header(&response, "cross-origin-embedder-policy"), "require-corp", "{path}");
        assert_eq!(header(&response, "cross-origin-resource-policy"), "same-origin", "{path}");
    }
}

#[tokio::test]
async fn a_range_is_answered_with_that_part() {
    let path = "/models/llama-72263b3aca0a1496/onnx/model_q4.onnx_data";
    let response = get(true, Method::GET, path, Some("bytes=2-4")).await;
    assert_eq!(response.status(), 206);
    assert_eq!(header(&response, "content-range"), "bytes 2-4/10");
    assert_eq!(to_bytes(response.into_body(), 100).await.unwrap(), "234");
}

#[tokio::test]
async fn head_tells_the_length() {
    let response = get(true, Method::HEAD, "/site.json", None).await;
    assert_eq!((response.status().as_u16(), header(&response, "content-length")), (200, "2"));
}

#[tokio::test]
async fn what_is_not_there_is_404_and_not_cached() {
    for path in ["/assets/gone.js", "/%2e%2e/Cargo.toml", "/models/"] {
        let response = get(true, Method::GET, path, None).await;
        assert_eq!(response.status(), 404, "{path}");
        assert_eq!(header(&response, "cache-control"), "no-store", "{path}");
    }
}

#[tokio::test]
async fn isolation_can_be_left_out() {
    let response = get(false, Method::GET, "/", None).await;
    assert_eq!(response.status(), 200);
    assert_eq!(header(&response, "cross-origin-opener-policy"), "");
    assert_eq!(header(&response, "cross-origin-embedder-policy"), "");
}

#[test]
fn a_folder_without_a_page_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refusal = site(dir.path(), true).unwrap_err();
    assert_eq!(refusal.code, INPUT);
    assert!(refusal.message.ends_with("has no index.html: it is no site"), "{refusal:?}");
}
