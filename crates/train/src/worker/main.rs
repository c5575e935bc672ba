//! The worker of the `train` family.
//!
//! Knows nothing of training: it prepares the process and names the steps.

mod blockwise;
mod curve;
mod data;
mod decoder;
mod device;
mod fit;
mod full;
mod fused;
mod linear;
mod lora;
mod optimiser;
mod plan;
mod pretrain;
mod resume;
mod shim;
mod stop;
mod tensor;
mod update;

use std::process::ExitCode;

fn main() -> ExitCode {
    environment();
    keep_memory();
    step::worker::main(&[
        ("train/pretrain", pretrain::run),
        ("train/lora", lora::run),
        ("train/full", full::run),
    ])
}

/// Settings that libraries read before `main`, or once: set them, and start over.
fn environment() {
    const SETTINGS: [(&str, &str); 2] = [
        // OpenMP's threads would spin while they wait: up to nine times the CPU time on a busy
        // machine.
        ("OMP_WAIT_POLICY", "passive"),
        // What cuBLAS needs to give the same bits every time.
        ("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
    ];
    let missing: Vec<_> =
        SETTINGS.into_iter().filter(|(name, _)| std::env::var_os(name).is_none()).collect();
    if missing.is_empty() {
        return;
    }
    #[cfg(unix)]
    if let Ok(program) = std::env::current_exe() {
        use std::os::unix::process::CommandExt;
        let arguments = std::env::args_os().skip(1);
        let error = std::process::Command::new(program).args(arguments).envs(missing).exec();
        eprintln!("cannot start over with the settings for OpenMP: {error}");
    }
}

/// Keeps freed memory in the process. A training step frees and takes the same buffers again, and
/// glibc would hand each of the larger ones back to the system in between: half a step's time.
fn keep_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (option, bytes) in [
        (libc::M_MMAP_THRESHOLD, 1 << 30),
        (libc::M_TRIM_THRESHOLD, i32::MAX),
        (libc::M_TOP_PAD, 64 << 20),
    ] {
        unsafe { libc::mallopt(option, bytes) };
    }
}
