//! Where to compute, and in what kind of number.
//!
//! Knows nothing of models.

use anyhow::Result;
use step::Failure;
use step::worker::Job;
use tch::{Cuda, Device, Kind};
use train::training::{Compute, Training};

use crate::shim;

/// The place that the keys `device` and `compute` come to on this machine.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    pub device: Device,
    pub compute: Kind,
}

/// Chooses the place for a model of so many parameters, makes libtorch deterministic there, and
/// tells the job of it.
pub fn prepare(job: &Job, training: &Training, parameters: usize) -> Result<Place> {
    use train::training::Device as Key;

    let has_cuda = training.device != Key::Cpu && load_cuda() && Cuda::is_available();
    let device = match training.device {
        Key::Cuda if !has_cuda => {
            return Err(Failure::environment("this machine has no CUDA device that libtorch can use")
                .hint("set `device = \"auto\"`, or put the lib folder of a PyTorch for CUDA in LD_LIBRARY_PATH")
                .into());
        }
        Key::Auto | Key::Cuda if has_cuda => Device::Cuda(0),
        _ => Device::Cpu,
    };
    let compute = match training.compute {
        Compute::Auto if device.is_cuda() => Kind::BFloat16,
        Compute::Bfloat16 => Kind::BFloat16,
        // Without matrix units BF16 takes a processor twice the time of float32.
        Compute::Auto | Compute::Float32 => Kind::Float,
    };
    // Results do not depend on how many there are.
    let threads = job.threads_for(2 * parameters as u64);
    tch::set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX));
    shim::deterministic(device == Device::Cpu);
    job.version("libtorch", shim::libtorch_version());
    job.version("device", if device.is_cuda() { gpu_name() } else { cpu_name() });
    job.version("compute", if compute == Kind::Float { "float32" } else { "bfloat16" });
    Ok(Place { device, compute })
}

/// Loads libtorch's CUDA half where the machine has one. It must come before anything asks for a
/// CUDA device: libtorch looks for its hooks only once.
fn load_cuda() -> bool {
    static LOADED: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *LOADED.get_or_init(|| {
        let flags = libc::RTLD_NOW | libc::RTLD_GLOBAL;
        !unsafe { libc::dlopen(c"libtorch_cuda.so".as_ptr(), flags) }.is_null()
    })
}

/// The most bytes that training has held at once: of the CUDA device, else of the processor's
/// memory. None where nobody tells.
pub fn peak_memory(device: Device) -> Option<u64> {
    if let Device::Cuda(index) = device {
        return shim::peak_memory(index);
    }
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib: u64 = field(&text, "VmHWM")?.strip_suffix(" kB")?.parse().ok()?;
    Some(1024 * kib)
}

fn cpu_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    field(&text, "model name").unwrap_or("cpu").to_string()
}

fn gpu_name() -> String {
    let folders = std::fs::read_dir("/proc/driver/nvidia/gpus").into_iter().flatten().flatten();
    let texts = folders.filter_map(|f| std::fs::read_to_string(f.path().join("information")).ok());
    let names = texts.filter_map(|text| field(&text, "Model").map(String::from));
    names.min().unwrap_or_else(|| "cuda".to_string())
}

/// The value of a line `name : value`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.split_once(':').map(|(_, value)| value.trim())
}
