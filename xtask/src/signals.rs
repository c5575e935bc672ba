//! Ctrl-C: workers end, and the build says what is kept.

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
