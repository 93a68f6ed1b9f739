//! Everything that can be checked by one process with two opened devices.

mod addresses;
mod completions;
mod connections;
mod datagrams;
mod errors;
mod extended;
mod groups;
mod imports;
mod limits;
mod mappings;
mod memory;
mod opcodes;
mod order;
mod overruns;
mod pinned;
mod races;
mod rates;
mod refusals;
mod regions;
mod states;
mod statuses;
mod threads;
mod writers;

pub(crate) use memory::{read_from, write_to};

use std::fmt;

use anyhow::Result;

use crate::xrc;

/// Why a check cannot be performed here.
#[derive(Debug)]
pub(crate) struct Skip(pub(crate) String);

impl fmt::Display for Skip {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "skipped: {}", self.0)
    }
}

impl std::error::Error for Skip {}

type Check = (&'static str, fn() -> Result<()>);

/// All checks, by the promise that each keeps. Those of memory and of rdma_cm begin with that word: no
/// seat matters to them.
pub(crate) const CHECKS: &[Check] = &[
    ("RC executes every opcode", opcodes::reliable),
    ("every function of an extended QP does what it says, and an extended CQ tells it", extended::reliable),
    ("an extended QP's windows are bound and invalidated", extended::windows),
    ("an extended CQ tells every field of a datagram's completion", extended::datagram),
    ("UC executes SEND and WRITE, and refuses what needs an answer", opcodes::unreliable),
    ("a fenced SEND carries what the READ before it brought", opcodes::fence),
    ("inline data of 0 to 256 bytes is taken at the post", opcodes::inline),
    ("thirty SGEs are gathered and scattered", opcodes::many_sges),
    ("messages may be empty", opcodes::empty),
    ("a message of 1 GiB arrives, and a longer one is refused", opcodes::one_gib),
    ("payloads of odd sizes and addresses arrive unharmed", opcodes::odd_places),
    ("a hundred thousand messages through a short queue keep their order", opcodes::wrap_around),
    ("unsignaled work completes in silence", completions::unsignaled),
    ("sq_sig_all signals everything", completions::all_signaled),
    ("a solicited-only arm sleeps until a solicited message", completions::solicited),
    ("an event comes once for an arm", completions::one_event_an_arm),
    ("twenty thousand ping-pongs by events lose no wake-up", completions::ping_pong_by_events),
    ("many QPs share a CQ and each keeps its order", completions::shared_queue),
    ("destroying a QP takes its completions along", completions::destroyed_qp),
    ("an empty channel says EAGAIN where it may not block", completions::nonblocking_channel),
    ("completions tell when they were taken, by the device's clock and the wall's", completions::times),
    ("destroying a QP waits for its events to be acknowledged", completions::unacknowledged_qp),
    ("destroying a CQ waits for its events to be acknowledged", completions::unacknowledged),
    ("a CQ with more completions of sends than entries is in error, and so is its QP", overruns::of_sends),
    (
        "a CQ with more completions of receives than entries is in error, and so is its QP",
        overruns::of_receives,
    ),
    ("an overrun fails all QPs of the CQ and no other", overruns::of_a_shared_queue),
    ("a CQ that is to ignore overruns loses nothing", overruns::ignored),
    ("completions that went with a QP fill no CQ", overruns::emptied),
    ("a CQ is resized under traffic, and overruns at its new size", overruns::resized),
    ("moderated events come after so many completions or so long", overruns::moderated),
    ("a QP sends no faster than its rate allows, and as fast when that is lifted", rates::kept),
    ("a rate can be an attribute of RTS, and ends with RESET", rates::by_attribute),
    ("datagrams keep to a rate", rates::of_datagrams),
    ("what goes to a null MR is dropped, and what comes from it are zeros", regions::null),
    ("a zero-based MR and one with an iova begin where they say", regions::displaced),
    ("relaxed ordering and unknown optional flags are permitted", regions::relaxed),
    ("a dma-buf is an MR's memory, and nothing else is", regions::dma_buf),
    ("what a device without Ethernet cannot do is not supported", refusals::not_offered),
    ("no order within a message is promised", refusals::data_in_order),
    ("enhancements are agreed upon, and there are none", refusals::enhancements),
    ("datagrams carry a header and can be answered by it", datagrams::answered),
    ("datagrams of a wrong qkey, to nobody, or too long for the receive vanish", datagrams::lost),
    ("a multicast group's datagrams reach every QP that is attached to it, and no other", groups::delivered),
    ("a QP that wants none of its own multicast datagrams gets those of others", groups::not_its_own),
    ("QPs join and leave multicast groups, and neither twice", groups::attachments),
    ("a context, a PD and an MR can be imported, and outlive those that they are of", imports::shared),
    ("an XRC receiver is opened by another process, and ends with the last that has it open", xrc::shared),
    ("an XRC receiver is opened by its number in its domain alone", xrc::opened),
    ("a QP walks the state table and nothing else", states::transitions),
    ("query_qp returns what was set", states::query),
    ("RESET empties a QP, which can be used anew", states::reset),
    ("ERR flushes in order what is posted before and after", states::flush),
    ("SQD holds sends back until RTS", states::drained),
    ("SQ_DRAINED comes when what was begun has ended", states::drained_late),
    ("the first request in RTR raises COMM_EST", states::established),
    ("requests sent before the peer's RTR succeed after it", states::early_requests),
    ("a full SQ and a full RQ say ENOMEM and name the work request", limits::full_queues),
    ("objects in use cannot be destroyed", limits::busy_objects),
    ("sizes beyond the device's are refused", limits::excess),
    ("device and port attributes are sane", limits::attributes),
    ("a remote access error raises QP_ACCESS_ERR and ends both QPs", errors::remote_access),
    ("rights that an MR or a QP lacks are refused", errors::missing_rights),
    ("a bad lkey ends in a local protection error", errors::local_protection),
    ("a message longer than the receive fails both ends", errors::too_long),
    ("a receive posted late ends the RNR wait", errors::late_receive),
    ("RNR retries are counted", errors::rnr_exceeded),
    ("a peer that is gone is silence until the retries are used up", errors::silent_peer),
    ("a fault of the requester ends its send queue, and the peer does not hear of it", statuses::local),
    ("without initiator depth there are no READs and atomics", statuses::initiator_depth),
    ("what a responder refuses ends both QPs, each with its own status", statuses::refused),
    ("a bad receive ends its QP on every service", statuses::bad_receives),
    ("UC loses what its responder refuses", statuses::lost_by_uc),
    ("a QP hears nobody but its peer", statuses::strangers),
    ("posts are refused in the wrong state, and of the wrong size", statuses::wrong_states),
    ("the last word of a WRITE becomes visible last", order::last_word_last),
    ("a WRITE of an aligned word is one store", order::one_store),
    ("a message completes after the WRITEs before it are visible", order::messages_after_writes),
    ("a QP can be connected to itself and to one of the same device", opcodes::loopback),
    ("nothing is written after an MR's deregistration", races::deregistration_under_fire),
    ("nothing is written after a QP's end by ERR or RESET", races::error_state_under_fire),
    ("nothing is written after a QP's destruction", races::destruction_under_fire),
    ("a receive that came back flushed is not written to", races::flushed_receives),
    ("many threads share a QP and its CQs", races::many_threads),
    ("threads that poll one CQ see each completion once", threads::shared_cq),
    ("threads make, use and destroy objects of one device", threads::coming_and_going),
    ("a thread can be cancelled that waits for a completion", threads::cancelled),
    ("threads of the device take no signals of the program", threads::deaf_to_signals),
    ("CQs go while their events are read and waited for", threads::destroyed_under_a_reader),
    ("a forked child cannot use the device and does it no harm", races::forked_child),
    ("GIDs are the addresses of the namespace and follow them", addresses::follow),
    ("all ways to read the GID table agree", addresses::table),
    ("rdma_cm carries private data both ways", connections::private_data),
    ("rdma_cm tells why a connection was refused", connections::rejections),
    ("rdma_cm channels block, poll, sit in epoll sets and say EAGAIN", connections::descriptors),
    ("rdma_cm takes the queued events of a destroyed id back", connections::revoked),
    ("rdma_cm waits for events to be acknowledged before an id goes", connections::acknowledged),
    ("rdma_cm moves an id and its queued events to another channel", connections::migration),
    ("rdma_cm gives a port once", connections::ports),
    ("rdma_cm takes its options", connections::options),
    ("rdma_cm channels are dead in a forked child", connections::forked_child),
    ("rdma_cm serves many threads on one channel", connections::threads),
    ("rdma_cm lets a thread be cancelled that waits for an event", connections::cancelled),
    ("memory beyond 4 GiB can be reached", memory::beyond_4_gib),
    ("memory survives fork, both sides of it", memory::fork),
    ("memory survives fork after ibv_fork_init, both sides of it", memory::fork_init),
    ("memory survives system() and popen()", memory::commands),
    ("memory registered twice and in overlapping parts works until the last MR goes", memory::overlaps),
    ("memory is the program's own again after deregistration", memory::deregistered),
    ("memory of a few unaligned bytes works with live neighbours", memory::small_neighbours),
    ("memory that may not be written is refused for LOCAL_WRITE", memory::read_only),
    ("memory that is not mapped is refused", memory::unmapped),
    ("memory of threads, heap, statics and stack is reachable", memory::kinds),
    ("memory of a deregistered MR is out of reach", memory::stale_key),
    (
        "memory that is registered while threads, the kernel and peers write to it loses no write",
        writers::none_loses_a_write,
    ),
    ("memory that is shared or a file's works", mappings::shared_and_files),
    ("memory that is registered with io_uring loses nothing", pinned::registered_with_io_uring),
    ("memory into which a file is read past the cache loses nothing", pinned::direct_reads),
    ("memory in huge pages works", mappings::huge_pages),
    ("memory that is locked works and stays locked", mappings::locked_memory),
    ("memory can be registered where none may be locked", mappings::no_locking),
    ("memory mapped anew under an MR is the program's alone", mappings::mapped_anew),
    ("memory that the program unmaps or moves under an MR keeps its bytes", mappings::unmapped_and_moved),
    ("memory registered on two devices works until the last MR goes", mappings::two_devices),
    ("memory of thirty thousand MRs side by side works", mappings::crowd_of_neighbours),
    ("memory of thirty thousand scattered MRs works", mappings::scattered_crowd),
    ("memory of thirty thousand MRs of a few bytes works", mappings::crowd_of_bytes),
    ("memory of an allocator is as it expects after deregistration", mappings::allocator),
];
