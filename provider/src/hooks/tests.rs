//! The hooks, called as libibverbs calls them, over a device of the test's own.

use std::collections::VecDeque;
use std::sync::Mutex;

use super::*;

#[derive(Default)]
struct FakeDevice {
    events: Mutex<VecDeque<u64>>,
    closed: Mutex<Vec<RawFd>>,
}

impl CommandChannel for FakeDevice {
    fn comp_channel_created(&self, _fd: RawFd) -> Result<(), Errno> {
        Ok(())
    }

    fn comp_channel_closed(&self, fd: RawFd) {
        self.closed.lock().unwrap().push(fd);
    }

    fn next_comp_event(&self, _fd: RawFd) -> Result<Option<CompEventDesc>, Errno> {
        Ok(self.events.lock().unwrap().pop_front().map(|cq_handle| CompEventDesc { cq_handle }))
    }

    fn next_async_event(&self) -> Result<Option<AsyncEventDesc>, Errno> {
        Ok(Some(AsyncEventDesc { element: 5, event_type: 9, reserved: 0 }))
    }

    fn async_descriptor(&self) -> Result<OwnedFd, Errno> {
        event_counter()
    }

    fn sysfs(&self, file: &str) -> Option<String> {
        (file == "ports/1/gids/0").then(|| "a gid\n".to_owned())
    }
}

struct Opened {
    device: Arc<FakeDevice>,
    command: OwnedFd,
    events: OwnedFd,
}

impl Opened {
    fn new() -> Opened {
        let device = Arc::new(FakeDevice::default());
        let (command, events) = (event_counter().unwrap(), event_counter().unwrap());
        let channel: Arc<dyn CommandChannel> = device.clone();
        registry::opened(command.as_raw_fd(), events.as_raw_fd(), &channel);
        Opened { device, command, events }
    }

    /// Writes a command as libibverbs would; the reply, or the errno.
    fn command(&self, command: u32) -> Result<RawFd, i32> {
        let mut response = CreateCompChannelResp { fd: u32::MAX };
        let header = CmdHdr { command, in_words: 4, out_words: 1 };
        let request = CreateCompChannel { hdr: header, response: (&raw mut response).addr() as u64 };
        // SAFETY: a whole command with a valid reply address.
        let written = unsafe { hooked_write(self.command.as_raw_fd(), (&raw const request).cast(), 16) };
        if written == 16 { Ok(response.fd as RawFd) } else { Err(errno()) }
    }

    fn add_event(&self, channel: RawFd, event: u64) {
        self.device.events.lock().unwrap().push_back(event);
        count(channel);
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        registry::remove(self.command.as_raw_fd());
        registry::remove(self.events.as_raw_fd());
    }
}

fn count(channel: RawFd) {
    // SAFETY: eight readable bytes.
    let written = unsafe { libc::write(channel, (&raw const ONE).cast(), 8) };
    assert_eq!(written, 8);
}

static ONE: u64 = 1;

fn read_record(fd: RawFd) -> Result<u64, i32> {
    let mut record = [0_u64; 2];
    // SAFETY: sixteen writable bytes.
    let taken = unsafe { hooked_read(fd, record.as_mut_ptr().cast(), 16) };
    if taken > 0 { Ok(record[0]) } else { Err(errno()) }
}

fn set_nonblocking(fd: RawFd) {
    // SAFETY: a flag change on a descriptor of the test.
    assert_eq!(unsafe { libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK) }, 0);
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap()
}

fn close(fd: RawFd) {
    // SAFETY: a descriptor of the test, for the last time.
    assert_eq!(unsafe { hooked_close(fd) }, 0);
}

#[test]
fn a_completion_channel_is_made_read_and_closed() {
    let opened = Opened::new();
    let channel = opened.command(CMD_CREATE_COMP_CHANNEL).unwrap();
    opened.add_event(channel, 0xc0ffee);
    assert_eq!(read_record(channel), Ok(0xc0ffee));
    set_nonblocking(channel);
    assert_eq!(read_record(channel), Err(libc::EAGAIN));
    close(channel);
    assert_eq!(*opened.device.closed.lock().unwrap(), [channel]);
    assert!(registry::look_up(channel).is_none());
}

#[test]
fn a_revoked_event_is_passed_over() {
    let opened = Opened::new();
    let channel = opened.command(CMD_CREATE_COMP_CHANNEL).unwrap();
    count(channel); // its event was revoked
    opened.add_event(channel, 7);
    assert_eq!(read_record(channel), Ok(7));
    set_nonblocking(channel);
    count(channel);
    assert_eq!(read_record(channel), Err(libc::EAGAIN));
    close(channel);
}

#[test]
fn a_reader_sleeps_until_an_event_comes() {
    let opened = Opened::new();
    let channel = opened.command(CMD_CREATE_COMP_CHANNEL).unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read_record(channel));
        std::thread::sleep(std::time::Duration::from_millis(20));
        opened.add_event(channel, 3);
        assert_eq!(reader.join().unwrap(), Ok(3));
    });
    close(channel);
}

#[test]
fn an_async_event_is_read_as_its_record() {
    let opened = Opened::new();
    count(opened.events.as_raw_fd());
    assert_eq!(read_record(opened.events.as_raw_fd()), Ok(5));
    // SAFETY: four writable bytes, too few for a record.
    let short = unsafe { hooked_read(opened.events.as_raw_fd(), [0_u32; 1].as_mut_ptr().cast(), 0) };
    assert_eq!((short, errno()), (-1, libc::EINVAL));
}

#[test]
fn other_commands_are_not_supported() {
    let opened = Opened::new();
    assert_eq!(opened.command(3), Err(libc::EOPNOTSUPP));
    // SAFETY: four readable bytes, too few for a command.
    let short = unsafe { hooked_write(opened.command.as_raw_fd(), (&raw const ONE).cast(), 4) };
    assert_eq!((short, errno()), (-1, libc::EINVAL));
}

/// A command with one attribute, as libibverbs passes it to `ioctl`.
#[repr(C)]
struct Command(IoctlHdr, IoctlAttr);

fn ioctl_command(object_id: u16) -> Command {
    let header = IoctlHdr {
        length: 40,
        object_id,
        method_id: 0,
        num_attrs: 1,
        reserved1: 0,
        driver_id: 0,
        reserved2: 0,
    };
    Command(header, IoctlAttr { attr_id: 0, len: 0, flags: 1, reserved: 0, data: 0 })
}

#[test]
fn an_imported_context_gets_an_async_descriptor_by_ioctl_and_nothing_else() {
    let opened = Opened::new();
    let give = |command: &mut Command| {
        // SAFETY: a whole command with its attribute.
        unsafe { hooked_ioctl(opened.command.as_raw_fd(), VERBS_IOCTL, (&raw mut *command).cast()) }
    };
    let mut command = ioctl_command(OBJECT_ASYNC_EVENT);
    assert_eq!(give(&mut command), 0);
    let events = command.1.data as RawFd;
    assert!(matches!(registry::look_up(events), Some((Role::Async, Owner::Live(_)))));
    count(events);
    assert_eq!(read_record(events), Ok(5));
    registry::remove(events);
    close(events);
    // A query of the GID table: libibverbs goes on to the files only after this very errno.
    assert_eq!((give(&mut ioctl_command(0)), errno()), (-1, libc::ENOTTY));
}

#[test]
fn a_device_is_found_by_a_copy_of_its_command_descriptor() {
    let opened = Opened::new();
    let copy = opened.command.try_clone().unwrap();
    let found = registry::device_of_copy(copy.as_raw_fd());
    if found.is_none() {
        println!("SKIP a_device_is_found_by_a_copy_of_its_command_descriptor: kcmp is refused here");
        return;
    }
    let device: Arc<dyn CommandChannel> = opened.device.clone();
    assert!(found.is_some_and(|found| Arc::ptr_eq(&found, &device)));
    let stranger = event_counter().unwrap();
    assert!(registry::device_of_copy(stranger.as_raw_fd()).is_none());
}

#[test]
fn descriptors_of_others_go_to_libc() {
    let (reader, writer) = std::io::pipe().unwrap();
    let (reader, writer) = (reader.into_raw_fd(), writer.into_raw_fd());
    // SAFETY: eight readable bytes.
    assert_eq!(unsafe { hooked_write(writer, (&raw const ONE).cast(), 8) }, 8);
    assert_eq!(read_record(reader), Ok(1));
    close(reader);
    close(writer);
}

#[test]
fn a_sysfs_file_is_what_the_newest_device_says() {
    let directory = tempdir();
    std::fs::write(format!("{directory}/fw_ver"), "from the file").unwrap();
    registry::add_directory(directory.as_bytes());
    let _opened = Opened::new();
    assert_eq!(sysfs_read(&format!("{directory}/ports/1/gids/0")).as_deref(), Some("a gid\n"));
    assert_eq!(sysfs_read(&format!("{directory}/fw_ver")).as_deref(), Some("from the file"));
    assert_eq!(sysfs_read(&format!("{directory}/absent")), None);
    std::fs::remove_dir_all(directory).unwrap();
}

fn tempdir() -> String {
    let path = std::env::temp_dir().join(format!("freeflow-hooks-{}", std::process::id()));
    std::fs::create_dir_all(&path).unwrap();
    path.into_os_string().into_string().unwrap()
}

fn sysfs_read(path: &str) -> Option<String> {
    let path = std::ffi::CString::new(path).unwrap();
    // SAFETY: a C string, and flags that need no mode.
    let fd = unsafe { hooked_openat(libc::AT_FDCWD, path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC, 0) };
    let mut buffer = [0_u8; 64];
    // SAFETY: as many writable bytes as said.
    let length = unsafe { hooked_read(fd, buffer.as_mut_ptr().cast(), buffer.len()) };
    (fd >= 0).then(|| {
        close(fd);
        String::from_utf8_lossy(&buffer[..length as usize]).into_owned()
    })
}

#[test]
fn the_rdma_netlink_protocol_is_refused() {
    // SAFETY: the socket is not looked at: the first call is refused, the second has no original to go to.
    unsafe {
        assert_eq!(hooked_nl_connect(std::ptr::null_mut(), NETLINK_RDMA), REFUSED);
    }
}

#[test]
fn a_forked_child_does_not_take_its_parents_events() {
    registry::guard_forks();
    let opened = Opened::new();
    let channel = opened.command(CMD_CREATE_COMP_CHANNEL).unwrap();
    opened.add_event(channel, 11);
    // SAFETY: the child calls only the hooks under test, which take no lock that another thread may hold.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let refused = read_record(channel) == Err(libc::EIO)
            && opened.command(CMD_CREATE_COMP_CHANNEL) == Err(libc::EIO);
        // SAFETY: ends the child at once, without its copies of the test's threads and locks.
        unsafe { libc::_exit(c_int::from(!refused)) }
    }
    let mut status = 0;
    // SAFETY: waits for the child made above.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0);
    assert_eq!(read_record(channel), Ok(11));
    close(channel);
}
