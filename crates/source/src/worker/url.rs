//! The work of `source/url`.

use source::huggingface::PinnedFile;
use source::url::Url;
use step::worker::Job;

use crate::download::{self, Wanted};

pub fn run(job: &Job) -> anyhow::Result<()> {
    let params: Url = job.params()?;
    let wanted = Wanted {
        name: params.file_name().to_string(),
        url: params.url.clone(),
        // The recipe pins the bytes; how many they are is known when they come.
        pin: PinnedFile { size: 0, sha256: params.sha256.clone() },
        token: None,
    };
    download::all(job, &[wanted])
}
