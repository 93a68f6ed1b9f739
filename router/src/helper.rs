//! Threads that access clients' foreign memory, one a client: each may wait for a page fault for as long as its
//! client likes, and then only this client's own requests wait.
//!
//! ```text
//!   lane --(accesses)--> helper of client A: pread, pwrite on /proc/A/mem --(performed)--> lane
//! ```
//!
//! A helper ends when its client does. One that is stuck at that moment cannot be made to end: it holds nothing but
//! the descriptor and a buffer, and counts as a client until the kernel lets it go.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering, fence},
        mpsc::{self, Receiver, Sender},
    },
    thread,
};

use engine::{Access, Fault, Foreign};
use verbs_abi::shm::lane::{LanePage, WakeWord};

/// Bytes of stack: a helper makes system calls and nothing else.
const STACK: usize = 128 * 1024;

/// `/proc/PID/mem` of a client, open for writing.
#[derive(Debug)]
pub(crate) struct ProcessMemory(File);

impl ProcessMemory {
    /// Wraps the file.
    pub(crate) fn new(file: File) -> Self {
        Self(file)
    }

    /// Whether the program is no more, or another one has taken its place. The kernel says so by an end of the file,
    /// which the memory of a living program has not.
    fn is_gone(&self) -> bool {
        matches!(self.0.read_at(&mut [0], 0), Ok(0))
    }
}

impl Foreign for ProcessMemory {
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault> {
        self.0.read_exact_at(into, addr).map_err(|_| Fault)
    }

    fn write(&self, addr: u64, from: &[u8]) -> Result<(), Fault> {
        self.0.write_all_at(from, addr).map_err(|_| Fault)
    }
}

/// Where performed accesses go: back to the lane, which is woken for them.
#[derive(Clone, Debug)]
pub(crate) struct WayBack {
    performed: Sender<Access>,
    page: LanePage,
    word: WakeWord,
    /// Helpers whose clients are gone.
    abandoned: Arc<AtomicUsize>,
}

impl WayBack {
    /// The way back to the lane of `page`, which sleeps on `word`; and the lane's end of it.
    pub(crate) fn new(page: LanePage, word: WakeWord) -> (Self, Receiver<Access>) {
        let (performed, arrivals) = mpsc::channel();
        (Self { performed, page, word, abandoned: Arc::default() }, arrivals)
    }

    /// Helpers that are still at work for clients that are gone.
    pub(crate) fn abandoned(&self) -> usize {
        self.abandoned.load(Ordering::Relaxed)
    }

    fn bring(&self, access: Access) {
        if self.performed.send(access).is_ok() {
            // The lane sets its flag before its last look: it finds the access, or we see the flag.
            fence(Ordering::SeqCst);
            if self.page.is_asleep() {
                self.word.wake();
            }
        }
    }
}

/// The helper of one client. It ends when this is dropped, as soon as the kernel lets it.
#[derive(Debug)]
pub(crate) struct Helper {
    accesses: Sender<Access>,
    abandoned: Arc<AtomicUsize>,
}

impl Helper {
    /// Starts one for a client's memory.
    ///
    /// # Errors
    /// What the kernel says when it has no thread to give.
    pub(crate) fn start(memory: Arc<ProcessMemory>, way_back: WayBack) -> io::Result<Self> {
        let (accesses, queue) = mpsc::channel();
        let abandoned = Arc::clone(&way_back.abandoned);
        let thread = thread::Builder::new().name("helper".to_owned()).stack_size(STACK);
        thread.spawn(move || serve(&memory, &queue, &way_back))?;
        Ok(Self { accesses, abandoned })
    }

    /// Has an access performed. Never waits.
    ///
    /// # Errors
    /// The access, if there is no thread any more.
    pub(crate) fn submit(&self, access: Access) -> Result<(), Access> {
        self.accesses.send(access).map_err(|mpsc::SendError(access)| access)
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.abandoned.fetch_add(1, Ordering::Relaxed);
    }
}

/// Counts itself out when the thread ends, however it does.
struct Attendance<'a>(&'a AtomicUsize);

impl Drop for Attendance<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn serve(memory: &ProcessMemory, queue: &Receiver<Access>, way_back: &WayBack) {
    let _attendance = Attendance(&way_back.abandoned);
    while let Ok(mut access) = queue.recv() {
        access.perform(memory);
        // The dead answer nothing: their peers run into their time-outs, as on a wire. The client's end, which follows,
        // ends its accesses.
        if !access.has_failed() || !memory.is_gone() {
            way_back.bring(access);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn the_memory_of_the_dead_ends_and_that_of_the_living_does_not() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let memory = ProcessMemory::new(File::open(format!("/proc/{}/mem", child.id())).unwrap());
        assert_eq!(memory.read(8, &mut [0]), Err(Fault), "nothing is mapped there");
        assert!(!memory.is_gone(), "a fault is not an end");
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(memory.read(8, &mut [0]), Err(Fault));
        assert!(memory.is_gone());
    }
}
