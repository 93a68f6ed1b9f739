//! Datagrams: learning the QP of a service, from either end. There is no connection afterwards.

use verbs_abi::proto::cm::{ConnParam, EventKind, EventParam, UdParam};

use crate::{
    Body, CommId, Manager, Refusal, UDP_QKEY,
    connect::{check, padded},
    id::{Phase, State},
    private_data, sidr,
};

impl Manager {
    pub(crate) fn ask_datagrams(&mut self, comm: CommId, param: ConnParam) -> Result<(), Refusal> {
        check(&param.private_data, private_data::DATAGRAM_REQUEST)?;
        let id = self.id_mut(comm)?;
        id.state = State::Connect;
        id.phase = Phase::SidrSent;
        let space = id.space;
        self.send(comm, Body::DatagramRequest { space, private_data: param.private_data });
        Ok(())
    }

    pub(crate) fn accept_datagrams(
        &mut self,
        comm: CommId,
        to: CommId,
        uid: u64,
        param: ConnParam,
    ) -> Result<(), Refusal> {
        check(&param.private_data, private_data::DATAGRAM_REPLY)?;
        let id = self.id_mut(comm)?;
        id.uid = uid;
        id.phase = Phase::SidrDone;
        let (status, private_data) = (sidr::SUCCESS, param.private_data);
        self.send(comm, Body::DatagramReply { to, status, qpn: param.qpn, qkey: UDP_QKEY, private_data });
        Ok(())
    }

    pub(crate) fn reject_datagrams(&mut self, comm: CommId, private_data: Vec<u8>) -> Result<(), Refusal> {
        check(&private_data, private_data::DATAGRAM_REPLY)?;
        let id = self.id_mut(comm)?;
        id.phase = Phase::Ended;
        let to = id.connection.remote.ok_or(Refusal::WrongState)?;
        self.send(comm, Body::DatagramReply { to, status: sidr::REJECT, qpn: 0, qkey: 0, private_data });
        Ok(())
    }

    /// The answer to [`Self::ask_datagrams`]; `qp` is QP number and Q_Key.
    pub(crate) fn datagrams_answered(
        &mut self,
        comm: CommId,
        from: CommId,
        status: u16,
        qp: (u32, u32),
        private_data: Vec<u8>,
    ) {
        let Ok(ah) = self.id(comm).and_then(|id| self.ah(id)) else { return };
        let Ok(id) = self.id_mut(comm) else { return };
        let private_data = padded(private_data, private_data::DATAGRAM_REPLY);
        if status == sidr::SUCCESS {
            id.phase = Phase::SidrDone;
            id.connection.remote = Some(from);
            let param = UdParam { qpn: qp.0, qkey: qp.1, ah, private_data };
            self.emit(comm, EventKind::Established, 0, EventParam::Ud(param));
        } else {
            id.phase = Phase::Ended;
            let param = UdParam { private_data, ..UdParam::default() };
            self.emit(comm, EventKind::Unreachable, status.into(), EventParam::Ud(param));
        }
    }
}

/// A refusal without words of the application.
pub(crate) fn refusal(to: CommId, status: u16) -> Body {
    Body::DatagramReply { to, status, qpn: 0, qkey: 0, private_data: Vec::new() }
}
