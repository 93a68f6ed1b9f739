//! The lane's end: posts, polls, gives orders and takes answers, without waiting.

use std::{
    collections::{HashMap, VecDeque},
    io,
    sync::{
        Arc, Weak,
        atomic::Ordering,
        mpsc::{Receiver, Sender},
    },
};

use engine::nic::{Completion, Event, Limits, Nic, NicSend, NicSge, Order, Refusal, ShadowId};
use verbs_abi::{
    ffi::{
        IBV_SEND_FENCE, IBV_SEND_SIGNALED, IBV_SEND_SOLICITED, IBV_WC_RECV_RDMA_WITH_IMM, ibv_send_wr,
        ibv_send_wr__bindgen_ty_1, ibv_send_wr__bindgen_ty_2, ibv_send_wr__bindgen_ty_2__bindgen_ty_1,
        ibv_sge, ibv_wc,
    },
    verbs::WcStatus,
};

use super::{
    Shared,
    verbs::{Cq, Qp, immediate},
};

/// Completions that are taken from a CQ at a time.
const COMPLETIONS: usize = 32;
/// The bit of a work request's id that says it is a receive; the shadow's number stands above.
const RECEIVE: u64 = 1 << 32;

/// What the worker is to do.
#[derive(Debug)]
pub(super) enum Command {
    Order(Order),
    /// The lane uses nothing of a device that is gone any more.
    Released,
}

/// What the worker tells.
#[derive(Debug)]
pub(super) enum Told {
    Event(Event),
    /// A CQ to be polled.
    Cq(Arc<Cq>),
    /// A QP to post to, before it is told of as opened; it may have ended meanwhile.
    Qp(ShadowId, Weak<Qp>),
    /// The device is gone.
    Gone,
    /// There is one again.
    Back(Limits),
}

/// The lane's end.
#[derive(Debug)]
pub(super) struct Handle {
    limits: Limits,
    orders: Sender<Command>,
    told: Receiver<Told>,
    shared: Arc<Shared>,
    qps: HashMap<ShadowId, Arc<Qp>>,
    cqs: Vec<Arc<Cq>>,
    events: VecDeque<Event>,
    is_gone: bool,
    sges: Vec<ibv_sge>,
}

impl Handle {
    pub(super) fn new(
        limits: Limits,
        orders: Sender<Command>,
        told: Receiver<Told>,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            limits,
            orders,
            told,
            shared,
            qps: HashMap::new(),
            cqs: Vec::new(),
            events: VecDeque::new(),
            is_gone: false,
            sges: Vec::new(),
        }
    }

    fn command(&self, command: Command) {
        // Nobody listens when the router ends.
        let _ = self.orders.send(command);
        self.shared.ring();
    }

    fn hear(&mut self, told: Told) {
        match told {
            Told::Event(event) => self.events.push_back(event),
            Told::Cq(cq) => {
                self.cqs.push(cq);
                self.shared.is_armed.store(false, Ordering::SeqCst);
            }
            Told::Qp(shadow, qp) => self.qps.extend(qp.upgrade().map(|qp| (shadow, qp))),
            Told::Gone => {
                self.is_gone = true;
                self.qps.clear();
                self.cqs.clear();
                self.command(Command::Released);
                self.events.push_back(Event::Lost);
            }
            Told::Back(limits) => {
                (self.limits, self.is_gone) = (limits, false);
                self.events.push_back(Event::Usable(true));
            }
        }
    }

    fn poll(&mut self) {
        let mut taken = [ibv_wc::default(); COMPLETIONS];
        for cq in &self.cqs {
            // A CQ that is broken is told of by its device.
            let count = cq.poll(&mut taken).unwrap_or(0);
            self.events.extend(taken[..count].iter().map(completion));
        }
    }

    fn list(&mut self, sges: &[NicSge]) {
        self.sges.clear();
        let list = sges.iter().map(|sge| ibv_sge { addr: sge.addr, length: sge.len, lkey: sge.lkey });
        self.sges.extend(list);
    }
}

impl Nic for Handle {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn order(&mut self, order: Order) {
        if let Order::Close(shadow) = order {
            self.qps.remove(&shadow);
        }
        self.command(Command::Order(order));
    }

    fn next_event(&mut self) -> Option<Event> {
        if self.events.is_empty() {
            while let Ok(told) = self.told.try_recv() {
                self.hear(told);
            }
            self.poll();
        }
        self.events.pop_front()
    }

    fn post_send(&mut self, shadow: ShadowId, send: &NicSend<'_>) -> Result<(), Refusal> {
        self.list(send.sges);
        let Some(qp) = self.qps.get(&shadow) else {
            // As on a wire: nobody answers.
            let (id, status) = (send.id, WcStatus::RetryExcErr);
            self.events.push_back(Event::Completion(Completion {
                shadow,
                id,
                is_receive: false,
                status,
                byte_len: 0,
                imm: None,
                is_write: false,
            }));
            return Ok(());
        };
        let flag = |on: bool, flag: u32| if on { flag } else { 0 };
        let wr = ibv_send_wr {
            wr_id: number(shadow, send.id),
            opcode: send.opcode.value(),
            send_flags: IBV_SEND_SIGNALED
                | flag(send.is_fenced, IBV_SEND_FENCE)
                | flag(send.is_solicited, IBV_SEND_SOLICITED),
            __bindgen_anon_1: ibv_send_wr__bindgen_ty_1 { imm_data: send.imm },
            wr: ibv_send_wr__bindgen_ty_2 {
                rdma: ibv_send_wr__bindgen_ty_2__bindgen_ty_1 {
                    remote_addr: send.remote_addr,
                    rkey: send.rkey,
                },
            },
            ..ibv_send_wr::default()
        };
        qp.post_send(wr, &mut self.sges).map_err(|error| refusal(&error))
    }

    fn post_receive(&mut self, shadow: ShadowId, id: u32, sges: &[NicSge]) -> Result<(), Refusal> {
        self.list(sges);
        let Some(qp) = self.qps.get(&shadow) else { return Ok(()) };
        qp.post_receive(number(shadow, id) | RECEIVE, &mut self.sges).map_err(|error| refusal(&error))
    }

    fn arm(&mut self) {
        if !self.shared.is_armed.swap(true, Ordering::SeqCst) {
            for cq in &self.cqs {
                if let Err(error) = cq.arm() {
                    tracing::debug!(%error, "a completion queue cannot be armed");
                }
            }
        }
    }
}

fn number(shadow: ShadowId, id: u32) -> u64 {
    u64::from(shadow) << 33 | u64::from(id)
}

fn refusal(error: &io::Error) -> Refusal {
    if error.raw_os_error() == Some(libc::ENOMEM) {
        return Refusal::Full;
    }
    tracing::debug!(%error, "the NIC takes no work request");
    Refusal::Broken
}

fn completion(wc: &ibv_wc) -> Event {
    Event::Completion(Completion {
        shadow: (wc.wr_id >> 33) as ShadowId,
        id: wc.wr_id as u32,
        is_receive: wc.wr_id & RECEIVE != 0,
        status: WcStatus::try_from(wc.status).unwrap_or(WcStatus::GeneralErr),
        byte_len: wc.byte_len,
        imm: immediate(wc),
        is_write: wc.opcode == IBV_WC_RECV_RDMA_WITH_IMM,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_completion_says_whose_and_which_it_is() {
        let wc = ibv_wc { wr_id: number(0x7fff_ffff, u32::MAX) | RECEIVE, status: 13, ..ibv_wc::default() };
        let Event::Completion(told) = completion(&wc) else { panic!("no completion") };
        assert_eq!((told.shadow, told.id, told.is_receive), (0x7fff_ffff, u32::MAX, true));
        assert_eq!((told.status, told.imm), (WcStatus::RnrRetryExcErr, None));
    }

    #[test]
    fn a_full_queue_is_told_from_a_broken_one() {
        assert_eq!(refusal(&io::Error::from_raw_os_error(libc::ENOMEM)), Refusal::Full);
        assert_eq!(refusal(&io::Error::from_raw_os_error(libc::EIO)), Refusal::Broken);
    }
}
