//! Virtual machines for all tests of a program: booted when the first test needs them, one test at a time.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, anyhow};
use libtest_mimic::{Failed, Trial};
use xtask::{interrupt, vm::Kernel};

/// A stage of guests (or of whatever is made of them).
pub(crate) struct GuestStage<T> {
    make: fn(&Kernel) -> Result<T>,
    state: Arc<Mutex<Option<Result<T, String>>>>,
}

impl<T: Send + 'static> GuestStage<T> {
    /// A stage that is made by this.
    pub(crate) fn new(make: fn(&Kernel) -> Result<T>) -> Self {
        Self { make, state: Arc::default() }
    }

    /// A test on this stage.
    pub(crate) fn trial(
        &self,
        name: impl Into<String>,
        test: impl FnOnce(&T) -> Result<()> + Send + 'static,
    ) -> Trial {
        let (make, state) = (self.make, Arc::clone(&self.state));
        Trial::test(name, move || {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            let made = state.get_or_insert_with(|| set_up(make).map_err(|error| format!("{error:#}")));
            let result = match made {
                Ok(guests) => interrupt::check().and_then(|()| test(guests)),
                Err(error) => Err(anyhow!("nothing to test on: {error}")),
            };
            result.map_err(|error| Failed::from(format!("{error:#}")))
        })
    }
}

fn set_up<T>(make: fn(&Kernel) -> Result<T>) -> Result<T> {
    let kernel = Kernel::prepare(&super::workspace())?;
    make(&kernel).context("no guests")
}
