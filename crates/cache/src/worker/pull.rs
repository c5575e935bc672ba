//! A result comes out of the cache: believed, then its files, each held to its digest.
//!
//! Whatever is wrong with it makes it a miss with a reason, and the local store never sees it.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use step::{ActionKey, ActionResult, BlobDigest, Failure};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinHandle;

use super::layout::{self, Blob, Part, Payload};
use super::{Remote, Tell};
use cache::Done;

/// Why a result does not come.
enum Miss {
    /// There is none.
    None,
    /// There is one, which cannot be used.
    Broken(String),
    Failed(Failure),
}

impl From<Failure> for Miss {
    fn from(failure: Failure) -> Self {
        Miss::Failed(failure)
    }
}

impl From<store::StoreError> for Miss {
    fn from(error: store::StoreError) -> Self {
        Miss::Failed(error.into())
    }
}

type Travelling = JoinHandle<Result<(Vec<u8>, OwnedSemaphorePermit), Failure>>;

impl Remote {
    pub async fn pull(self: &Arc<Self>, key: ActionKey, tell: &Tell) -> Result<Done, Failure> {
        let mut etag = String::new();
        match self.fetch_result(key, &mut etag, tell).await {
            Ok((result, transferred)) => Ok(Done::Pulled { result: Box::new(result), transferred }),
            Err(Miss::None) => Ok(Done::Absent { why: None }),
            Err(Miss::Failed(failure)) => Err(failure),
            Err(Miss::Broken(why)) => {
                // Whoever makes it again may take its place.
                self.broken.lock().expect("no panic while holding it").insert(key, etag);
                Ok(Done::Absent { why: Some(format!("the cache's result is not used: {why}")) })
            }
        }
    }

    async fn fetch_result(
        self: &Arc<Self>,
        key: ActionKey,
        etag: &mut String,
        tell: &Tell,
    ) -> Result<(ActionResult, u64), Miss> {
        let stored = self.bucket.get(&layout::result(key), layout::RESULT_LIMIT).await?;
        let Some((object, stored)) = stored else { return Err(Miss::None) };
        *etag = object.etag;
        let payload = self.believe(key, &stored).map_err(Miss::Broken)?;
        let size: u64 = payload.blobs.iter().map(|blob| blob.size).sum();
        let mut progress = Progress { done: 0, total: size, transferred: 0, tell };
        let mut packed: BTreeMap<BlobDigest, Vec<&Blob>> = BTreeMap::new();
        for blob in &payload.blobs {
            if self.store.has_sized(blob.digest, blob.size) {
                progress.has(blob.size, 0);
                continue;
            }
            match blob.parts.as_slice() {
                [part] if !part.whole => packed.entry(part.chunk).or_default().push(blob),
                _ => self.fetch_blob(blob, &mut progress).await?,
            }
        }
        for (chunk, blobs) in packed {
            self.fetch_pack(chunk, &blobs, &mut progress).await?;
        }
        self.complete(&payload.result).map_err(Miss::Broken)?;
        Ok((payload.result, progress.transferred))
    }

    /// What a stored result says, if it can be believed.
    pub fn believe(&self, key: ActionKey, stored: &[u8]) -> Result<Payload, String> {
        let payload = self.trusted.check(stored)?;
        let payload: Payload =
            serde_json::from_str(&payload).map_err(|e| format!("it cannot be read: {e}"))?;
        match payload.key == key && payload.result.key == key {
            true => Ok(payload),
            false => Err(format!("it is that of another action, {}", payload.key.short())),
        }
    }

    /// A file that is made of one chunk or several, some of which travel while others are written.
    async fn fetch_blob(
        self: &Arc<Self>,
        blob: &Blob,
        progress: &mut Progress<'_>,
    ) -> Result<(), Miss> {
        let mut incoming = self.store.receive()?;
        let mut parts = blob.parts.iter();
        let mut next = parts.next();
        let mut travelling: VecDeque<(&Part, Travelling)> = VecDeque::new();
        loop {
            while let Some(part) = next {
                if part.size > super::pieces::LARGEST {
                    return Err(Miss::Broken("it names a piece that is too large".into()));
                }
                let free = match self.memory.clone().try_acquire_owned() {
                    Ok(free) => free,
                    // Whoever has the rest of the memory is at work, and has a first piece on its way.
                    Err(_) if !travelling.is_empty() => break,
                    Err(_) => self.memory.clone().acquire_owned().await.expect("never closed"),
                };
                let (remote, chunk, size) = (self.clone(), part.chunk, part.size);
                let range = (!part.whole).then(|| part.offset..part.offset.saturating_add(size));
                let buffer = self.buffers.lock().expect("no panic while holding it").pop();
                let task = tokio::spawn(async move {
                    Ok((remote.read(chunk, range, size, buffer.unwrap_or_default()).await?, free))
                });
                travelling.push_back((part, task));
                next = parts.next();
            }
            let Some((part, task)) = travelling.pop_front() else { break };
            let (mut bytes, _memory) = task.await.expect("no fetch panics")?;
            if bytes.len() as u64 != part.size {
                return Err(self.damaged(part.chunk));
            }
            tokio::task::block_in_place(|| incoming.write(&bytes))?;
            progress.has(part.size, bytes.len() as u64);
            bytes.clear();
            self.buffers.lock().expect("no panic while holding it").push(bytes);
        }
        let Err(came) = tokio::task::block_in_place(|| incoming.finish(blob.digest))? else {
            return Ok(());
        };
        // Which of them was it? Each byte is hashed once where all is well.
        let mut at = 0;
        for part in &blob.parts {
            let mut bytes = vec![0; usize::try_from(part.size).expect("a part fits in memory")];
            came.read_exact_at(&mut bytes, at).map_err(|e| {
                Failure::environment(format!("cannot read back what was written to the store: {e}"))
            })?;
            if part.whole && BlobDigest::of(&bytes) != part.chunk {
                return Err(self.damaged(part.chunk));
            }
            at += part.size;
        }
        let mut damaged = self.damaged.lock().expect("no panic while holding it");
        damaged.extend(blob.parts.iter().map(|part| part.chunk));
        Err(Miss::Broken(format!("the bytes of {} are others", blob.digest.short())))
    }

    /// The bytes of a chunk, or of a range of it, in this empty buffer. It stays empty if the chunk is
    /// not there, or there are more than `limit`: then it is not what it was.
    async fn read(
        &self,
        chunk: BlobDigest,
        range: Option<Range<u64>>,
        limit: u64,
        mut bytes: Vec<u8>,
    ) -> Result<Vec<u8>, Failure> {
        let limit = usize::try_from(limit).expect("a chunk fits in memory");
        bytes.reserve_exact(limit);
        let mut larger = false;
        let take = |piece: &[u8]| {
            larger = bytes.len() + piece.len() > limit;
            if larger {
                return Err(Failure::environment("it is larger than it may be"));
            }
            bytes.extend_from_slice(piece);
            Ok(())
        };
        match self.bucket.fetch(&layout::chunk(chunk), range, take).await {
            Err(_) if larger => Ok(Vec::new()),
            found => found.map(|_| bytes),
        }
    }

    /// Small files, which lie in one chunk.
    async fn fetch_pack(
        &self,
        chunk: BlobDigest,
        blobs: &[&Blob],
        progress: &mut Progress<'_>,
    ) -> Result<(), Miss> {
        let _memory = self.memory.acquire().await.expect("never closed");
        let pack = self.read(chunk, None, super::pieces::LARGEST, Vec::new()).await?;
        if BlobDigest::of(&pack) != chunk {
            return Err(self.damaged(chunk));
        }
        progress.has(0, pack.len() as u64);
        for blob in blobs {
            let [part] = blob.parts.as_slice() else { continue };
            let end = part.offset.checked_add(part.size).and_then(|end| usize::try_from(end).ok());
            let range = usize::try_from(part.offset).ok().zip(end).map(|(from, to)| from..to);
            let bytes = range.and_then(|range| pack.get(range)).unwrap_or_default();
            if BlobDigest::of(bytes) != blob.digest {
                let digest = blob.digest.short();
                return Err(Miss::Broken(format!("the bytes of {digest} are others")));
            }
            self.store.put_bytes(bytes)?;
            progress.has(blob.size, 0);
        }
        Ok(())
    }

    fn damaged(&self, chunk: BlobDigest) -> Miss {
        self.damaged.lock().expect("no panic while holding it").insert(chunk);
        let name = layout::chunk(chunk);
        Miss::Broken(format!("{name} is lost, or has other bytes than its name says"))
    }

    /// Whether the local store has all that a result stands on now.
    fn complete(&self, result: &ActionResult) -> Result<(), String> {
        for tree in [result.output, result.report] {
            let tree = self.store.tree(tree).map_err(|_| "its list of files is not with it")?;
            let has = |entry: &&step::Entry| !self.store.has_sized(entry.digest, entry.size);
            if let Some(entry) = tree.entries().iter().find(has) {
                return Err(format!("{} is not with it", entry.path));
            }
        }
        match self.store.has(result.log) {
            true => Ok(()),
            false => Err("its log is not with it".into()),
        }
    }
}

struct Progress<'a> {
    done: u64,
    total: u64,
    transferred: u64,
    tell: &'a Tell,
}

impl Progress<'_> {
    fn has(&mut self, bytes: u64, transferred: u64) {
        self.done += bytes;
        self.transferred += transferred;
        self.tell.progress(self.done, self.total);
    }
}
