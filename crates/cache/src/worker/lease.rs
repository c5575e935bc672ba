//! Who runs an action now: an object in the bucket, renewed while its owner lives.
//!
//! No clock is compared with another: a lease has run out when somebody has watched it for its whole
//! time and it was not renewed. Where the store does not hold to conditions there are no leases.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use s3::{Bytes, Condition, Put, Written};
use serde::{Deserialize, Serialize};
use step::{ActionKey, Failure};
use tokio::task::JoinHandle;

use super::layout;
use super::{Remote, Tell};
use cache::Done;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Lease {
    format: u32,
    /// `process 12 on host`.
    holder: String,
    /// Tells one holder from the next, and one renewal from another: ETags are digests.
    token: u64,
    renewed: u64,
}

/// A lease of ours.
pub struct Ours {
    renewing: JoinHandle<()>,
    /// Somebody took it over: we were too slow.
    lost: Arc<AtomicBool>,
}

impl Remote {
    /// Ours to run, somebody else's, or made already.
    pub async fn lease(
        self: &Arc<Self>,
        key: ActionKey,
        who: &str,
        tell: &Tell,
    ) -> Result<Done, Failure> {
        let name = layout::lease(key);
        if self.write && !self.holds_to_conditions(tell).await? {
            return Ok(Done::Leased);
        }
        let there = self.look(&name).await?;
        let condition = match &there {
            Some((etag, lease)) if !self.has_run_out(key, etag) => {
                return Ok(Done::Held { holder: lease.holder.clone() });
            }
            Some((etag, _)) => Condition::Still(etag.clone()),
            None => Condition::New,
        };
        if !self.write {
            return Ok(Done::Leased);
        }
        let lease = Lease {
            format: cache::FORMAT,
            holder: who.to_string(),
            token: fastrand::u64(..),
            renewed: 0,
        };
        let etag = match self.bucket.put(&name, text(&lease), &Put::when(condition)).await? {
            Written::Now(etag) => etag,
            // Somebody was faster, unless it was ourselves and the answer got lost.
            Written::Refused => match self.look(&name).await? {
                Some((etag, now)) if now.token == lease.token => etag,
                Some((_, now)) => return Ok(Done::Held { holder: now.holder }),
                None => return Ok(Done::Free),
            },
        };
        let lost = Arc::new(AtomicBool::new(false));
        let renewing = tokio::spawn(self.clone().renew(name, lease, etag, lost.clone()));
        let ours = Ours { renewing, lost };
        self.leases.lock().expect("no panic while holding it").insert(key, ours);
        // Whoever had it before may have given its result meanwhile.
        match self.pull(key, tell).await {
            Ok(Done::Absent { .. }) => Ok(Done::Leased),
            other => {
                self.release(key).await?;
                other
            }
        }
    }

    /// Waits for the result of whoever runs the action.
    pub async fn wait(self: &Arc<Self>, key: ActionKey, tell: &Tell) -> Result<Done, Failure> {
        let name = layout::lease(key);
        let pause = (self.lease_time / 10).min(Duration::from_secs(2));
        let mut seen: Option<(String, Instant)> = None;
        loop {
            let there = self.look(&name).await?;
            if self.bucket.head(&layout::result(key)).await?.is_some() {
                let pulled = self.pull(key, tell).await?;
                if matches!(pulled, Done::Pulled { .. }) {
                    return Ok(pulled);
                }
            }
            let Some((etag, _)) = there else { return Ok(Done::Free) };
            match &seen {
                Some((before, since)) if *before == etag => {
                    if since.elapsed() > self.lease_time {
                        let mut run_out = self.run_out.lock().expect("no panic while holding it");
                        run_out.insert(key, etag);
                        return Ok(Done::Free);
                    }
                }
                _ => seen = Some((etag, Instant::now())),
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Gives a lease of ours back.
    pub async fn release(&self, key: ActionKey) -> Result<(), Failure> {
        let ours = self.leases.lock().expect("no panic while holding it").remove(&key);
        let Some(Ours { renewing, lost }) = ours else { return Ok(()) };
        renewing.abort();
        match lost.load(Ordering::SeqCst) {
            true => Ok(()),
            false => self.bucket.delete(&layout::lease(key)).await,
        }
    }

    pub async fn release_all(&self) {
        let keys: Vec<ActionKey> = {
            let leases = self.leases.lock().expect("no panic while holding it");
            leases.keys().copied().collect()
        };
        for key in keys {
            // It runs out.
            let _ = self.release(key).await;
        }
    }

    async fn renew(
        self: Arc<Self>,
        name: String,
        mut lease: Lease,
        mut etag: String,
        lost: Arc<AtomicBool>,
    ) {
        loop {
            tokio::time::sleep(self.lease_time / 4).await;
            lease.renewed += 1;
            let put = Put::when(Condition::Still(etag.clone()));
            match self.bucket.put(&name, text(&lease), &put).await {
                Ok(Written::Now(now)) => etag = now,
                Ok(Written::Refused) => match self.look(&name).await {
                    Ok(Some((now, there))) if there.token == lease.token => etag = now,
                    Ok(_) => return lost.store(true, Ordering::SeqCst),
                    Err(_) => {}
                },
                // The next time, perhaps.
                Err(_) => {}
            }
        }
    }

    async fn look(&self, name: &str) -> Result<Option<(String, Lease)>, Failure> {
        let Some((object, bytes)) = self.bucket.get(name, 1 << 16).await? else { return Ok(None) };
        // One that cannot be read is still somebody's: it runs out.
        let lease = serde_json::from_slice(&bytes).unwrap_or_else(|_| Lease {
            format: cache::FORMAT,
            holder: "somebody".into(),
            token: 0,
            renewed: 0,
        });
        Ok(Some((object.etag, lease)))
    }

    fn has_run_out(&self, key: ActionKey, etag: &str) -> bool {
        let run_out = self.run_out.lock().expect("no panic while holding it");
        run_out.get(&key).is_some_and(|of| of == etag)
    }

    /// Whether the store holds to conditions: asked once.
    pub async fn holds_to_conditions(&self, tell: &Tell) -> Result<bool, Failure> {
        let ask = || async {
            let holds = self.bucket.is_conditional(layout::PROBES).await?;
            if !holds {
                tell.note("the store ignores conditional writes: two machines may make the same");
            }
            Ok(holds)
        };
        self.conditional.get_or_try_init(ask).await.copied()
    }
}

fn text(lease: &Lease) -> Bytes {
    serde_json::to_vec(lease).expect("a lease serialises to JSON").into()
}
