//! rdma-core's own tests against the virtual device, and the committed tables of what they come to.
//!
//! [`suite`] gets a release's tests together with the pyverbs that they need, [`patched`] the libraries of which nothing
//! need be intercepted, [`run`] lets them run, each in a process
//! of its own, and [`table`] compares what came of it with what is promised. Leaves to others: the tests themselves
//! (rdma-core), and what runs one of them (`conformance/driver.py`).

pub mod patched;
pub mod run;
pub mod suite;
pub mod table;

pub use run::{Report, run};
pub use suite::{Suite, Tests};
pub use table::{Outcome, Table};
