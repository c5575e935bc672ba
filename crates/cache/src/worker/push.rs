//! A result goes into the cache: its chunks first, then its signed list. The first result wins.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use s3::{Bytes, Condition, Put, Written};
use step::{ActionKey, ActionResult, BlobDigest, Failure, Tree};
use store::Store;
use tokio::task::JoinSet;

use super::layout::{self, Blob, Part, Payload};
use super::pieces::{self, LARGEST, SMALL, onnx, pieces};
use super::{Remote, Tell};
use cache::Done;

/// Small pieces travel together once they are so many bytes, or there are no more.
const PACK: usize = LARGEST as usize / 2;

/// A result on its way up.
struct Upload<'a> {
    remote: &'a Arc<Remote>,
    tell: &'a Tell,
    blobs: Vec<Blob>,
    /// Small pieces, and who waits to hear which chunk they are in: blob, part.
    pack: Vec<u8>,
    packed: Vec<(usize, usize)>,
    travelling: JoinSet<Result<Sent, Failure>>,
    seen: HashSet<BlobDigest>,
    done: u64,
    total: u64,
    transferred: u64,
    shared: u64,
}

/// A file of the store that goes up.
struct Wanted {
    size: u64,
    /// Where its tensors begin, if another file says so.
    tensors: Vec<u64>,
}

impl Wanted {
    fn of(size: u64) -> Self {
        Self { size, tensors: Vec::new() }
    }
}

struct Sent {
    size: u64,
    /// Whether it was there already.
    shared: bool,
}

impl Remote {
    pub async fn push(self: &Arc<Self>, key: ActionKey, tell: &Tell) -> Result<Done, Failure> {
        let Some(secret) = &self.secret else {
            return Err(Failure::input(
                "results cannot be given to the cache: nothing to sign with",
            )
            .hint(format!(
                "make a key with `cargo xtask cache keygen`, and set {}",
                cache::SIGNING_KEY_FILE
            )));
        };
        let name = layout::result(key);
        let result = self.store.actions().lookup(key)?.found().ok_or_else(|| {
            Failure::environment(format!("the store has lost the result of {}", key.short()))
        })?;
        let broken = self.broken.lock().expect("no panic while holding it").get(&key).cloned();
        if broken.is_none()
            && let Some((object, stored)) = self.bucket.get(&name, layout::RESULT_LIMIT).await?
        {
            match self.believe(key, &stored) {
                Ok(_) => return Ok(Done::Pushed { transferred: 0, shared: 0 }),
                Err(_) => {
                    let mut broken = self.broken.lock().expect("no panic while holding it");
                    broken.insert(key, object.etag);
                }
            }
        }
        let wanted = tokio::task::block_in_place(|| self.stands_on(&result))?;
        let total = wanted.values().map(|file| file.size).sum();
        let mut upload = Upload {
            remote: self,
            tell,
            blobs: Vec::new(),
            pack: Vec::new(),
            packed: Vec::new(),
            travelling: JoinSet::new(),
            seen: HashSet::new(),
            done: 0,
            total,
            transferred: 0,
            shared: 0,
        };
        for (digest, file) in wanted {
            upload.blob(digest, file).await?;
        }
        upload.flush().await?;
        while upload.arrived().await? {}
        let Upload { blobs, transferred, shared, .. } = upload;
        let payload = Payload { key, result, blobs };
        let payload = serde_json::to_string(&payload).expect("results serialise to JSON");
        let signed = serde_json::to_vec(&secret.sign(payload)).expect("text serialises to JSON");
        let broken = self.broken.lock().expect("no panic while holding it").remove(&key);
        let put = Put {
            condition: broken.map_or(Condition::New, Condition::Still),
            content_type: Some("application/json".into()),
            ..Put::default()
        };
        let size = signed.len() as u64;
        // Where somebody was faster, theirs is the result: ours is as good, and stays here.
        let _: Written = self.bucket.put(&name, signed.into(), &put).await?;
        Ok(Done::Pushed { transferred: transferred + size, shared })
    }

    /// All blobs that somebody needs who takes the result.
    fn stands_on(&self, result: &ActionResult) -> Result<BTreeMap<BlobDigest, Wanted>, Failure> {
        let mut all = BTreeMap::new();
        let mut known = |digest: BlobDigest| {
            // What explains a key need not be here.
            if let Ok(metadata) = std::fs::metadata(self.store.blob_path(digest)) {
                all.insert(digest, Wanted::of(metadata.len()));
            }
        };
        known(BlobDigest::from_bytes(*result.key.as_bytes()));
        known(result.log);
        if let Ok(action) = self.store.action(result.key) {
            known(BlobDigest::from_bytes(*action.code.as_bytes()));
            for tree in action.inputs.values() {
                known(BlobDigest::from_bytes(*tree.as_bytes()));
            }
        }
        for digest in [result.output, result.report] {
            known(BlobDigest::from_bytes(*digest.as_bytes()));
        }
        for digest in [result.output, result.report] {
            let tree = self.store.tree(digest)?;
            for entry in tree.entries() {
                all.entry(entry.digest).or_insert(Wanted::of(entry.size));
            }
            for (digest, tensors) in tensors(&self.store, &tree) {
                all.entry(digest).and_modify(|file| file.tensors = tensors);
            }
        }
        Ok(all)
    }
}

/// Where tensors begin in the files whose graph lies in the same folder.
fn tensors(store: &Store, tree: &Tree) -> BTreeMap<BlobDigest, Vec<u64>> {
    let entries = tree.entries();
    let graphs = entries.iter().filter(|entry| entry.path.ends_with(".onnx"));
    let mut all = BTreeMap::new();
    for graph in graphs.filter(|graph| graph.size <= pieces::HEADER) {
        // What is damaged will say so when it is sent.
        let Ok(bytes) = store.blob(graph.digest) else { continue };
        let folder = graph.path.rfind('/').map_or("", |slash| &graph.path[..=slash]);
        for (name, tensors) in onnx::external_data(&bytes).unwrap_or_default() {
            let path = format!("{folder}{name}");
            if let Ok(at) = entries.binary_search_by_key(&path.as_str(), |entry| &entry.path) {
                all.insert(entries[at].digest, tensors);
            }
        }
    }
    all
}

impl Upload<'_> {
    async fn blob(&mut self, digest: BlobDigest, wanted: Wanted) -> Result<(), Failure> {
        let Wanted { size, tensors } = wanted;
        let path = self.remote.store.blob_path(digest);
        let unreadable = |e| Failure::environment(format!("cannot read {}: {e}", path.display()));
        let file = File::open(&path).map_err(unreadable)?;
        let cut =
            tokio::task::block_in_place(|| pieces(&file, size, &tensors)).map_err(unreadable)?;
        let place = self.blobs.len();
        self.blobs.push(Blob { digest, size, parts: Vec::new() });
        let mut hasher = blake3::Hasher::new();
        for piece in cut {
            let length = usize::try_from(piece.end - piece.start).expect("a piece fits");
            let bytes = tokio::task::block_in_place(|| {
                let mut bytes = vec![0; length];
                file.read_exact_at(&mut bytes, piece.start)?;
                hasher.update(&bytes);
                Ok(bytes)
            });
            let bytes = bytes.map_err(unreadable)?;
            self.done += bytes.len() as u64;
            if bytes.len() as u64 <= SMALL {
                self.pack(place, &bytes).await?;
            } else {
                let chunk = BlobDigest::of(&bytes);
                let size = bytes.len() as u64;
                self.blobs[place].parts.push(Part { chunk, offset: 0, size, whole: true });
                self.send(chunk, bytes.into()).await?;
            }
        }
        match hasher.finalize().as_bytes() == digest.as_bytes() {
            true => Ok(()),
            false => {
                self.remote.store.verify_blob(digest)?;
                let message = format!("{} changed while it was read", path.display());
                Err(Failure::environment(message))
            }
        }
    }

    async fn pack(&mut self, place: usize, bytes: &[u8]) -> Result<(), Failure> {
        let parts = &mut self.blobs[place].parts;
        self.packed.push((place, parts.len()));
        let (offset, size) = (self.pack.len() as u64, bytes.len() as u64);
        // Its chunk has no digest until it is whole.
        let chunk = BlobDigest::from_bytes([0; 32]);
        parts.push(Part { chunk, offset, size, whole: false });
        self.pack.extend_from_slice(bytes);
        if self.pack.len() >= PACK { self.flush().await } else { Ok(()) }
    }

    async fn flush(&mut self) -> Result<(), Failure> {
        let pack = std::mem::take(&mut self.pack);
        if self.packed.is_empty() {
            return Ok(());
        }
        let chunk = BlobDigest::of(&pack);
        for (blob, part) in std::mem::take(&mut self.packed) {
            self.blobs[blob].parts[part].chunk = chunk;
        }
        self.send(chunk, pack.into()).await
    }

    /// Sends a chunk, once there is memory for it. What is in flight lies there, too.
    async fn send(&mut self, chunk: BlobDigest, bytes: Bytes) -> Result<(), Failure> {
        if !self.seen.insert(chunk) {
            return Ok(());
        }
        let free = loop {
            match self.remote.memory.clone().try_acquire_owned() {
                Ok(free) => break free,
                Err(_) if !self.travelling.is_empty() => _ = self.arrived().await?,
                Err(_) => {
                    break self.remote.memory.clone().acquire_owned().await.expect("never closed");
                }
            }
        };
        let remote = self.remote.clone();
        self.travelling.spawn(async move {
            let sent = remote.send_chunk(chunk, bytes).await;
            drop(free);
            sent
        });
        Ok(())
    }

    /// Waits for a chunk to arrive; whether one was on its way.
    async fn arrived(&mut self) -> Result<bool, Failure> {
        let Some(sent) = self.travelling.join_next().await else { return Ok(false) };
        let Sent { size, shared } = sent.expect("no upload panics")?;
        match shared {
            true => self.shared += size,
            false => self.transferred += size,
        }
        self.tell.progress(self.done, self.total);
        Ok(true)
    }
}

impl Remote {
    async fn send_chunk(&self, chunk: BlobDigest, bytes: Bytes) -> Result<Sent, Failure> {
        let name = layout::chunk(chunk);
        let size = bytes.len() as u64;
        let damaged = self.damaged.lock().expect("no panic while holding it").contains(&chunk);
        let there = self.bucket.head(&name).await?;
        if there.is_some_and(|object| object.size == size) && !damaged {
            return Ok(Sent { size, shared: true });
        }
        // Whoever writes this name writes the same bytes; what is there by it otherwise is damaged.
        self.bucket.put(&name, bytes, &Put::default()).await?;
        self.damaged.lock().expect("no panic while holding it").remove(&chunk);
        Ok(Sent { size, shared: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_graph_knows_the_tensors_of_the_files_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let folder = dir.path().join("model");
        std::fs::create_dir_all(folder.join("onnx")).unwrap();
        let put = |name: &str, bytes: &[u8]| std::fs::write(folder.join(name), bytes).unwrap();
        put("onnx/graph.onnx", include_bytes!("pieces/golden/graph.onnx"));
        put("onnx/graph.onnx_data", b"in the graph's folder");
        put("graph.onnx_data_1", b"not in it");
        put("other.onnx", b"no graph");
        let tree = store.ingest(&folder).unwrap();
        let data = BlobDigest::of(b"in the graph's folder");
        assert_eq!(tensors(&store, &tree), [(data, vec![0, 4000, 16000])].into());
    }
}
