//! For tests: an S3 server in this process, and a proxy that does to its traffic what networks do.
//!
//! Both listen on loopback, on any free port, in a thread of their own, and end with their value.

mod proxy;
mod server;

use std::net::SocketAddr;

use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

pub use proxy::{Fault, Proxy};
pub use server::{KEY_ID, SECRET, Server};

/// A thread that serves. Ends when this is dropped.
struct Listening {
    address: SocketAddr,
    /// The thread's runtime ends when this is gone.
    _stop: tokio::sync::oneshot::Sender<()>,
}

/// Answers HTTP/1.1 with `answer`, each connection in a task of its own. An error drops the
/// connection.
fn listen<A, F, B, E>(answer: A) -> std::io::Result<Listening>
where
    A: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    F: Future<Output = Result<Response<B>, E>> + Send,
    B: hyper::body::Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>>
        + Send
        + 'static,
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    // Bound by the caller, who may be within a runtime of its own.
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serve = async move {
        let listener = TcpListener::from_std(listener).expect("it does not block");
        while let Ok((stream, _)) = listener.accept().await {
            let answer = answer.clone();
            tokio::spawn(async move {
                let _ = stream.set_nodelay(true);
                let connection = hyper::server::conn::http1::Builder::new();
                let _ = connection.serve_connection(TokioIo::new(stream), service_fn(answer)).await;
            });
        }
    };
    std::thread::spawn(move || {
        runtime.spawn(serve);
        let _ = runtime.block_on(stopped);
        runtime.shutdown_background();
    });
    Ok(Listening { address, _stop: stop })
}
