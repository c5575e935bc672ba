//! Ctrl-C: workers end, and the build says what is kept. A pipe that nobody reads any more.

use std::sync::Arc;

use engine::Running;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use step::Failure;

/// From now on the first signal stops what runs; a second one is not waited for.
pub fn stop(running: Arc<Running>) -> Result<(), Failure> {
    let mut signals = Signals::new([SIGINT, SIGTERM])
        .map_err(|e| Failure::environment(format!("cannot listen for Ctrl-C: {e}")))?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if running.is_stopped() {
                let _ = signal_hook::low_level::emulate_default_handler(signal);
            }
            running.stop();
        }
    });
    Ok(())
}

/// `cargo xtask plan | head` is no failed print: we end with whoever read us, as programs do.
pub fn end_with_the_reader() {
    // SAFETY: no thread runs yet, and no handler is set.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}
