//! Passes requests on to a [`Server`], and does to some of them what networks and busy stores do.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use http_body_util::channel::Channel;
use http_body_util::{BodyExt, Either, Full};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::server::{open, settings};
use super::{Listening, Server, listen};
use crate::{Bucket, Settings};

type Broken = Box<dyn std::error::Error + Send + Sync>;
/// A body that ends before its length.
type Half = Channel<Bytes, Broken>;

/// What may happen to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The store is too busy: 503, and nothing done.
    Busy,
    /// The connection drops before the store has heard.
    DroppedBefore,
    /// It drops once the store has done what was asked: nobody hears that it has.
    DroppedAfter,
    /// Half of the answer, and then nothing.
    Truncated,
    /// One bit of the answer's body is another.
    FlippedAnswer,
    /// One bit of what is sent is another.
    FlippedRequest,
}

impl Fault {
    pub const ALL: [Fault; 6] = [
        Fault::Busy,
        Fault::DroppedBefore,
        Fault::DroppedAfter,
        Fault::Truncated,
        Fault::FlippedAnswer,
        Fault::FlippedRequest,
    ];
}

/// A proxy before a [`Server`].
pub struct Proxy {
    listening: Listening,
    state: Arc<State>,
}

struct State {
    chance: Mutex<fastrand::Rng>,
    /// One request in so many is done something to.
    one_in: AtomicUsize,
    /// Faults still to come.
    left: AtomicUsize,
    kinds: Vec<Fault>,
    requests: AtomicUsize,
}

impl Proxy {
    /// One that does, by chance of this seed, `faults` of these `kinds` to one in `one_in` requests;
    /// then it only passes on.
    pub fn start(
        server: &Server,
        seed: u64,
        kinds: &[Fault],
        one_in: usize,
        faults: usize,
    ) -> Self {
        let state = Arc::new(State {
            chance: Mutex::new(fastrand::Rng::with_seed(seed)),
            one_in: one_in.into(),
            left: faults.into(),
            kinds: kinds.to_vec(),
            requests: 0.into(),
        });
        let (to, shared) = (server.address(), state.clone());
        let answer = move |request| pass(request, to, shared.clone());
        Self { listening: listen(answer).expect("loopback has a free port"), state }
    }

    pub fn settings(&self) -> Settings {
        settings(&self.listening)
    }

    pub fn bucket(&self, prefix: &str) -> Bucket {
        open(prefix, &self.settings())
    }

    /// Faults that have not happened yet.
    pub fn left(&self) -> usize {
        self.state.left.load(Ordering::SeqCst)
    }

    /// Requests that came, those that were dropped too.
    pub fn requests(&self) -> usize {
        self.state.requests.load(Ordering::SeqCst)
    }
}

impl State {
    /// What is done to the next request, and a random number for where.
    fn next(&self) -> (Option<Fault>, usize) {
        self.requests.fetch_add(1, Ordering::SeqCst);
        let mut chance = self.chance.lock().expect("no panic while holding it");
        let kind = self.kinds.get(chance.usize(..self.kinds.len().max(1))).copied();
        let place = chance.usize(..);
        let due = chance.usize(..self.one_in.load(Ordering::SeqCst)) == 0;
        let less = |left: usize| left.checked_sub(1);
        let due = due && self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok();
        (kind.filter(|_| due), place)
    }
}

async fn pass(
    request: Request<Incoming>,
    to: std::net::SocketAddr,
    state: Arc<State>,
) -> Result<Response<Either<Full<Bytes>, Half>>, Broken> {
    let (fault, place) = state.next();
    let (head, body) = request.into_parts();
    let mut body = body.collect().await?.to_bytes();
    match fault {
        Some(Fault::Busy) => {
            let mut busy = Response::new(Either::Left(Full::default()));
            *busy.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            return Ok(busy);
        }
        Some(Fault::DroppedBefore) => return Err("dropped".into()),
        Some(Fault::FlippedRequest) => body = flipped(body, place),
        _ => {}
    }
    let stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let answer = sender.send_request(Request::from_parts(head, Full::new(body))).await?;
    let (head, body) = answer.into_parts();
    let body = body.collect().await?.to_bytes();
    Ok(match fault {
        Some(Fault::DroppedAfter) => return Err("dropped".into()),
        Some(Fault::FlippedAnswer) => {
            Response::from_parts(head, Either::Left(Full::new(flipped(body, place))))
        }
        // The head tells of all of it.
        Some(Fault::Truncated) if !body.is_empty() => {
            let part = body.slice(..place % body.len());
            let (mut sender, half) = Half::new(1);
            tokio::spawn(async move {
                let _ = sender.send(Frame::data(part)).await;
                // What was sent is to arrive.
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                sender.abort("dropped".into());
            });
            Response::from_parts(head, Either::Right(half))
        }
        _ => Response::from_parts(head, Either::Left(Full::new(body))),
    })
}

fn flipped(bytes: Bytes, place: usize) -> Bytes {
    let mut bytes = bytes.to_vec();
    let at = place % bytes.len().max(1);
    bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << (place % 8));
    bytes.into()
}
