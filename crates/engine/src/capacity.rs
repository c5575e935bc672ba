//! What this machine has: threads, memory, an accelerator's memory.

use std::fmt;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use step::{Needs, Saving};

/// How many threads this process may use at once. The answer takes a dozen files to find out.
pub(crate) fn threads_here() -> usize {
    static KNOWN: OnceLock<usize> = OnceLock::new();
    *KNOWN.get_or_init(|| std::thread::available_parallelism().map_or(1, |n| n.get()))
}

/// Bytes of memory that this machine could give to steps now, where the system tells.
pub(crate) fn memory_here() -> u64 {
    meminfo("MemAvailable:").unwrap_or(u64::MAX)
}

/// A step that takes more memory than there is, and what would make it fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TooLarge {
    needs: u64,
    has: u64,
    /// `this machine`, `the GPU`.
    place: &'static str,
    /// Changes to the recipe, and bytes with each and those before it.
    changes: Vec<(String, u64)>,
}

/// At most so many changes are told.
const CHANGES: usize = 3;

impl fmt::Display for TooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { needs, has, place, changes } = self;
        let [needs, has] = [*needs, *has].map(gigabytes);
        write!(f, "it takes about {needs}, and {place} has {has}")?;
        for (i, (change, bytes)) in changes.iter().enumerate() {
            let so_far = if i == 0 { ": set" } else { ", then" };
            write!(f, "{so_far} `{change}` ({})", gigabytes(*bytes))?;
        }
        Ok(())
    }
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

/// Why a step cannot fit on this machine, if that is known.
pub(crate) fn too_large(needs: &Needs) -> Option<TooLarge> {
    needs.memory?;
    let gpu = if needs.accelerator { gpu_memory() } else { None };
    does_not_fit(needs, memory_of_all(), gpu)
}

fn does_not_fit(needs: &Needs, memory: u64, gpu: Option<u64>) -> Option<TooLarge> {
    let (has, place) = gpu.map_or((memory, "this machine"), |bytes| (bytes, "the GPU"));
    let of = |memory: step::Memory| match gpu {
        Some(_) => memory.on_accelerator,
        None => memory.on_processor,
    };
    let needed = of(needs.memory?);
    if needed <= has {
        return None;
    }
    let mut changes = Vec::new();
    for Saving { change, memory } in needs.savings.iter().take(CHANGES) {
        changes.push((change.clone(), of(*memory)));
        if of(*memory) <= has {
            break;
        }
    }
    Some(TooLarge { needs: needed, has, place, changes })
}

/// Bytes of all memory that this process may have.
fn memory_of_all() -> u64 {
    static KNOWN: OnceLock<u64> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        let limit = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
        let limit = limit.and_then(|text| text.trim().parse().ok()).unwrap_or(u64::MAX);
        meminfo("MemTotal:").unwrap_or(u64::MAX).min(limit)
    })
}

/// Bytes of the first GPU's memory, if there is one that CUDA can use. Asks another process, once.
fn gpu_memory() -> Option<u64> {
    static KNOWN: OnceLock<Option<u64>> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        let asked = Command::new("nvidia-smi")
            .args(["--query-gpu=memory.total", "--format=csv,noheader,nounits"])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()
            .ok()?;
        let text = String::from_utf8(asked.stdout).ok()?;
        let mebibytes: u64 = text.lines().next()?.trim().parse().ok()?;
        Some(mebibytes << 20)
    })
}

/// Bytes on the line of /proc/meminfo that begins so.
fn meminfo(name: &str) -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use step::Memory;

    use super::*;

    #[test]
    fn what_cannot_fit_is_refused_with_what_would_make_it_fit() {
        let memory = |processor: u64, accelerator: u64| Memory {
            on_processor: processor * 1_000_000_000,
            on_accelerator: accelerator * 1_000_000_000,
        };
        let saving = |change: &str, memory| Saving { change: change.into(), memory };
        let needs = Needs {
            memory: Some(memory(40, 20)),
            savings: vec![
                saving("gradient_checkpointing = true", memory(30, 15)),
                saving("bits = 4", memory(10, 5)),
                saving("batch_tokens = 512", memory(9, 4)),
            ],
            ..Needs::default()
        };
        let refused = |memory: u64, gpu: Option<u64>| {
            let gigabytes = |n: u64| n * 1_000_000_000;
            let refused = does_not_fit(&needs, gigabytes(memory), gpu.map(gigabytes));
            refused.map(|how| how.to_string())
        };
        assert_eq!(refused(40, None), None);
        assert_eq!(refused(16, Some(24)), None);
        assert_eq!(
            refused(24, None).unwrap(),
            "it takes about 40.0 GB, and this machine has 24.0 GB: set `gradient_checkpointing = \
             true` (30.0 GB), then `bits = 4` (10.0 GB)"
        );
        assert_eq!(
            refused(99, Some(16)).unwrap(),
            "it takes about 20.0 GB, and the GPU has 16.0 GB: set `gradient_checkpointing = \
             true` (15.0 GB)"
        );
    }
}
