//! Receiving datagrams: at once where the receive's memory is mapped, else through the inbox.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use verbs_abi::{
    proto::Gid,
    shm::{cqe::Cqe, wqe::Address},
    verbs::{WcFlags, WcOpcode, WcStatus},
};

use super::{OPERATION, Reply, Request, Responder};
use crate::{
    Access, Memory,
    datagram::{GRH_LEN, grh, packet_kind},
    foreign::Task,
    inbox::{Inbox, Parcel},
    stage::Stage,
    transfer::{Broken, Side, are_mapped, gather, take_out, transfer},
};

impl Responder {
    /// Takes a datagram in. One without a receive, or longer than that, is lost, as on a wire.
    pub(crate) fn datagram<M: Memory>(
        &mut self,
        memory: &M,
        request: &Request<'_, M>,
        sgid: &Gid,
        address: &Address,
        stage: &mut Stage,
    ) -> Reply {
        if !self.state.may_respond() || self.qkey != address.qkey {
            return Reply::Silence;
        }
        let payload = match gather(request.payload, request.len, stage) {
            Ok(payload) => payload,
            Err(Broken::Foreign) => return Reply::Foreign,
            Err(_) => return Reply::SourceFault,
        };
        let header = grh(sgid, address, request.len);
        let total = request.len + GRH_LEN as u64;
        if self.inbox.len() > 0 {
            return self.keep(&header, payload, request);
        }
        if self.take_receive(memory, total).is_err() {
            return Reply::Silence;
        }
        if !are_mapped(&self.spans) {
            return self.keep(&header, payload, request);
        }
        let target = (memory, self.spans.as_slice());
        let mut unused = Stage::default();
        let moved = transfer(Side::Bytes(&header), target, (0, 0), GRH_LEN as u64, &mut unused)
            .and_then(|_| transfer(payload, target, (0, GRH_LEN as u64), request.len, &mut unused));
        match moved {
            Ok(_) => {
                let cqe = self.datagram_receipt(request, &header);
                self.complete(&cqe, request.solicited);
                Reply::Ack
            }
            Err(Broken::Source) => Reply::SourceFault,
            Err(_) => self.refuse_receive(WcStatus::LocProtErr, OPERATION),
        }
    }

    fn datagram_receipt<M>(&self, request: &Request<'_, M>, header: &[u8; GRH_LEN]) -> Cqe {
        let mut cqe = self.receipt(request, WcOpcode::Recv, request.len + GRH_LEN as u64);
        cqe.flags |= WcFlags::GRH.bits() as u8;
        cqe.sl = packet_kind(header);
        cqe
    }

    /// Keeps a datagram until its receive's memory was accessed, if there is a receive for it.
    fn keep<M: Memory>(
        &mut self,
        header: &[u8; GRH_LEN],
        payload: Side<'_, M>,
        request: &Request<'_, M>,
    ) -> Reply {
        if !self.has_receive_for_one_more() {
            return Reply::Silence;
        }
        let mut bytes = vec![0; GRH_LEN + request.len as usize];
        bytes[..GRH_LEN].copy_from_slice(header);
        if take_out(payload, &mut bytes[GRH_LEN..]).is_err() {
            return Reply::SourceFault;
        }
        let receipt = self.datagram_receipt(request, header);
        self.inbox.push(Parcel { bytes, receipt, solicited: request.solicited });
        Reply::Ack
    }

    /// Whether a datagram behind those of the inbox finds a receive.
    fn has_receive_for_one_more(&self) -> bool {
        let waiting = self.inbox.len() as u64;
        match &self.shared {
            Some(queue) => waiting == 0 && self.claimed.is_some() || queue.has_receive(),
            None => {
                let posted = self.area.header.rq_tail().load(Ordering::SeqCst);
                posted.wrapping_sub(self.completions.count()) > waiting
            }
        }
    }

    /// Places the first datagram of the inbox. `None`: there is none, or an access is on its way.
    pub(crate) fn deliver<M: Memory>(&mut self, memory: &M) -> Option<Reply> {
        if self.inbox.len() == 0 || self.inbox.stage.in_flight() {
            return None;
        }
        if !self.state.may_respond() {
            self.inbox.clear();
            return None;
        }
        let parcel = self.inbox.pop()?;
        let mut stage = std::mem::take(&mut self.inbox.stage);
        let total = parcel.bytes.len() as u64;
        if self.take_receive(memory, total).is_err() {
            return Some(Reply::Silence);
        }
        let moved = transfer(Side::Bytes(&parcel.bytes), (memory, &self.spans), (0, 0), total, &mut stage);
        Some(match moved {
            Ok(_) => {
                self.complete(&Cqe { wr_id: self.wqe.wr_id, ..parcel.receipt }, parcel.solicited);
                Reply::Ack
            }
            Err(Broken::Foreign) => {
                self.inbox.put_back(parcel);
                self.inbox.stage = stage;
                Reply::Foreign
            }
            Err(_) => self.refuse_receive(WcStatus::LocProtErr, OPERATION),
        })
    }

    /// Lets the inbox count against what its client may keep (router).
    pub(crate) fn set_inbox(&mut self, held: Arc<AtomicU64>) {
        self.inbox = Inbox::new(held);
    }

    /// Whether datagrams wait to be delivered.
    #[inline]
    pub(crate) fn has_parcels(&self) -> bool {
        self.inbox.len() > 0
    }

    /// The access that the last delivery asked for, under that ticket.
    pub(crate) fn launch(&mut self, ticket: u64, cancelled: &Arc<AtomicBool>) -> Option<Task> {
        self.inbox.stage.launch(ticket, cancelled)
    }

    /// An access has come back. False: not the one that is waited for.
    pub(crate) fn arrive(&mut self, access: Access) -> bool {
        self.inbox.stage.arrive(access)
    }
}
