//! Work requests that are executed by a peer on another host, several at a time: what is done to one that is not at
//! the head of the queue. Leaves to the initiator (`wire`): which, when and in what order.

use verbs_abi::{
    shm::wqe::{BadWqe, SendWqe, flag},
    verbs::{Opcode, WcStatus},
};

use super::{Attempt, Requester};
use crate::{
    Memory,
    memory::Span,
    responder::Reply,
    retry::Retry,
    stage::Stage,
    transfer::{Broken, Side, append, locate, transfer},
    wire::Piece,
};

/// Why a piece of a work request was not moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Obstacle {
    /// An access to foreign memory must come first; the stage says which.
    Foreign,
    /// The work request ends with this.
    Fault(WcStatus),
}

impl From<Broken> for Obstacle {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Foreign => Self::Foreign,
            // Both ends of what is moved here are the requester's own.
            Broken::Source | Broken::Target => Self::Fault(WcStatus::LocProtErr),
        }
    }
}

impl Requester {
    /// Copies the work request out that lies so many blocks behind the head. False: there is none.
    pub(crate) fn look_ahead(&self, blocks: u64, wqe: &mut SendWqe) -> Result<bool, BadWqe> {
        self.area.read_send(self.head.wrapping_add(blocks), wqe)
    }

    /// Treats a work request as if it were the fetched one.
    fn with<R>(&mut self, wqe: &mut Box<SendWqe>, act: impl FnOnce(&mut Self) -> R) -> R {
        std::mem::swap(&mut self.wqe, wqe);
        let result = act(self);
        std::mem::swap(&mut self.wqe, wqe);
        result
    }

    /// Checks a work request itself.
    pub(crate) fn inspect<M: Memory>(
        &mut self,
        local: &M,
        wqe: &mut Box<SendWqe>,
    ) -> Result<Opcode, WcStatus> {
        self.with(wqe, |requester| requester.check(local))
    }

    /// Checks a work request itself, and tells the pieces of its list.
    pub(crate) fn spans_of<M: Memory>(
        &mut self,
        local: &M,
        wqe: &mut Box<SendWqe>,
    ) -> Result<(Opcode, &[Span]), WcStatus> {
        let opcode = self.inspect(local, wqe)?;
        Ok((opcode, &self.spans))
    }

    /// Appends `len` bytes of its payload from `at` on.
    pub(crate) fn export<M: Memory>(
        &mut self,
        local: &M,
        wqe: &mut Box<SendWqe>,
        (at, len): (u64, u64),
        stage: &mut Stage,
        into: &mut Vec<u8>,
    ) -> Result<(), Obstacle> {
        self.with(wqe, |requester| {
            requester.check(local).map_err(Obstacle::Fault)?;
            Ok(append(requester.payload(local), at, len, stage, into)?)
        })
    }

    /// Says where `len` bytes of its payload from `at` on are. False: not all are mapped, or they are in the queue.
    pub(crate) fn locate<M: Memory>(
        &mut self,
        local: &M,
        wqe: &mut Box<SendWqe>,
        (at, len): (u64, u64),
        tell: &mut dyn FnMut(Piece),
    ) -> Result<bool, WcStatus> {
        self.with(wqe, |requester| {
            requester.check(local)?;
            Ok(requester.wqe.inline().is_none() && locate(requester.payload(local), at, len, tell))
        })
    }

    /// Puts bytes that came back into its list, `at` bytes into it.
    pub(crate) fn import<M: Memory>(
        &mut self,
        local: &M,
        wqe: &mut Box<SendWqe>,
        at: u64,
        bytes: &[u8],
        stage: &mut Stage,
    ) -> Result<(), Obstacle> {
        self.with(wqe, |requester| {
            requester.check(local).map_err(Obstacle::Fault)?;
            let spans: &[Span] = &requester.spans;
            transfer(Side::Bytes(bytes), (local, spans), (0, at), bytes.len() as u64, stage)?;
            Ok(())
        })
    }

    fn payload<'a, M: Memory>(&'a self, local: &'a M) -> Side<'a, M> {
        match self.wqe.inline() {
            Some(bytes) => Side::Bytes(bytes),
            None => Side::Spans(local, &self.spans),
        }
    }

    /// Binds or invalidates a window of the own client.
    pub(crate) fn change_own<M: Memory>(
        &mut self,
        local: &M,
        wqe: &mut Box<SendWqe>,
    ) -> Result<(), WcStatus> {
        let changed = self.with(wqe, |requester| {
            let opcode = requester.check(local)?;
            Ok(requester.change_window(opcode, local))
        })?;
        if changed == Reply::Ack { Ok(()) } else { Err(WcStatus::MwBindErr) }
    }

    /// Ends the work request at the head, which is this one.
    pub(crate) fn finish(&mut self, wqe: &mut Box<SendWqe>, status: WcStatus) {
        std::mem::swap(&mut self.wqe, wqe);
        self.fetched = true;
        match Opcode::try_from(u32::from(self.wqe.opcode)) {
            Ok(opcode) if status == WcStatus::Success => self.succeed(opcode, self.wqe.length()),
            _ => drop(self.fail(status, false, None)),
        }
    }

    /// Appends the fetched datagram's payload where `pack` says, which makes its header.
    pub(crate) fn export_datagram<M: Memory>(
        &mut self,
        local: &M,
        pack: impl FnOnce(&SendWqe, &mut dyn FnMut(&mut Vec<u8>) -> Result<(), Broken>) -> Result<(), Broken>,
    ) -> Result<(), Attempt> {
        let length = self.wqe.length();
        let mut stage = std::mem::take(&mut self.stage);
        let packed = pack(&self.wqe, &mut |into| append(self.payload(local), 0, length, &mut stage, into));
        self.stage = stage;
        match packed {
            Ok(()) => Ok(()),
            Err(Broken::Foreign) => Err(Attempt::Foreign(None)),
            Err(_) => Err(self.fail(WcStatus::LocProtErr, false, None)),
        }
    }

    /// READs and atomics that may be outstanding.
    pub(crate) fn depth(&self) -> usize {
        self.max_rd_atomic.into()
    }

    /// The retries of what is outstanding.
    pub(crate) fn retry(&mut self) -> &mut Retry {
        &mut self.retry
    }
}

/// Whether a work request waits for earlier READs and atomics.
pub(crate) fn is_fenced(wqe: &SendWqe) -> bool {
    wqe.flags & flag::FENCE != 0
}
