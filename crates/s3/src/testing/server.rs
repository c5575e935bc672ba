//! s3s-fs, with signatures checked and with conditional writes made atomic: it looks, and then
//! writes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyper::{Method, body::Incoming};
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tokio::sync::RwLock;

use super::{Listening, listen};
use crate::{Bucket, Location, Settings};

/// The credentials that it takes.
pub const KEY_ID: &str = "AKIDEXAMPLE";
pub const SECRET: &str = "secretexample";

/// The headers that a conditional write has.
const CONDITIONS: [&str; 2] = ["if-none-match", "if-match"];

/// A server with one bucket, `bucket`, in a temporary folder.
pub struct Server {
    dir: tempfile::TempDir,
    listening: Listening,
}

impl Server {
    pub fn start() -> Self {
        Self::with(true)
    }

    /// One that takes conditions and writes all the same. It asks for no credentials either, since
    /// signatures cover those headers.
    pub fn unconditional() -> Self {
        Self::with(false)
    }

    fn with(conditional: bool) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder can be made");
        std::fs::create_dir(dir.path().join("bucket")).expect("it is empty");
        let files = s3s_fs::FileSystem::new(dir.path()).expect("the folder is there");
        let mut service = S3ServiceBuilder::new(files);
        if conditional {
            service.set_auth(SimpleAuth::from_single(KEY_ID, SECRET));
        }
        let service = service.build();
        let writes = Arc::new(RwLock::new(()));
        let listening = listen(move |mut request: hyper::Request<Incoming>| {
            let (service, writes) = (service.clone(), writes.clone());
            async move {
                if !conditional {
                    for name in CONDITIONS.iter().chain(&["authorization"]) {
                        request.headers_mut().remove(*name);
                    }
                }
                let request = request.map(s3s::Body::from);
                if [Method::GET, Method::HEAD].contains(request.method()) {
                    return service.call(request).await;
                }
                if CONDITIONS.iter().any(|name| request.headers().contains_key(*name)) {
                    let _alone = writes.write().await;
                    service.call(request).await
                } else {
                    let _together = writes.read().await;
                    service.call(request).await
                }
            }
        });
        Self { dir, listening: listening.expect("loopback has a free port") }
    }

    pub fn settings(&self) -> Settings {
        settings(&self.listening)
    }

    /// The place `s3://bucket/<prefix>` on it.
    pub fn bucket(&self, prefix: &str) -> Bucket {
        open(prefix, &self.settings())
    }

    pub(super) fn address(&self) -> std::net::SocketAddr {
        self.listening.address
    }

    /// Where the bucket's objects lie as files: to look at, and to tamper with.
    pub fn files(&self) -> PathBuf {
        self.dir.path().join("bucket")
    }

    /// Every object's name, sorted.
    pub fn names(&self) -> Vec<String> {
        fn visit(dir: &Path, root: &Path, out: &mut Vec<String>) {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    visit(&path, root, out);
                } else if let Ok(name) = path.strip_prefix(root) {
                    out.push(name.to_string_lossy().into_owned());
                }
            }
        }
        let (root, mut out) = (self.files(), Vec::new());
        visit(&root, &root, &mut out);
        out.sort();
        out
    }
}

pub(super) fn settings(listening: &Listening) -> Settings {
    let endpoint = Some(format!("http://{}", listening.address));
    Settings { endpoint, region: None, path_style: true }
}

pub(super) fn open(prefix: &str, settings: &Settings) -> Bucket {
    let location = Location { bucket: "bucket".into(), prefix: prefix.into() };
    Bucket::with_keys(&location, settings, KEY_ID, SECRET)
}
