//! The words of `freeflow status`, collected.

use std::collections::{HashMap, HashSet};

use engine::{DataPath, QpSnapshot};
use verbs_abi::verbs::QpType;

use crate::{
    addresses,
    session::{Session, mode_name},
    status::{Client, Counters, Lane, Qp},
};

/// The clients, lanes and QPs of a snapshot, as far as they are those of the `sessions` that the asker may know of.
/// Who may not know how often the lane sleeps counts its own work only.
pub(crate) fn fill<'a>(
    status: &mut crate::status::Status,
    sessions: impl Iterator<Item = &'a Session>,
    snapshot: &[QpSnapshot],
    sleeps: Option<u64>,
) {
    let mut totals = HashMap::<u64, Counters>::new();
    let qps: Vec<Qp> = snapshot.iter().map(queue_pair).collect();
    for qp in &qps {
        add(totals.entry(qp.client).or_default(), &qp.counters);
    }
    status.clients = sessions
        .filter_map(|session| {
            let (pid, uid) = (session.peer().pid, session.peer().uid);
            let client = session.client()?.status();
            let counters = totals.get(&client.id).copied().unwrap_or_default();
            Some(Client { pid, uid, counters, ..client })
        })
        .collect();
    let known: HashSet<u64> = status.clients.iter().map(|client| client.id).collect();
    let counted = qps.iter().filter(|qp| sleeps.is_some() || known.contains(&qp.client));
    let work_requests = counted.map(|qp| qp.counters.tx_messages).sum();
    status.lanes = vec![Lane { id: 0, work_requests, sleeps: sleeps.unwrap_or(0) }];
    status.qps = qps.into_iter().filter(|qp| known.contains(&qp.client)).collect();
    status.qps.sort_by_key(|qp| qp.qpn);
}

/// A port space of rdma_cm, as people write it.
pub(crate) fn port_space(space: u16) -> &'static str {
    match space {
        cm::space::TCP => "tcp",
        cm::space::UDP => "udp",
        cm::space::IPOIB => "ipoib",
        _ => "ib",
    }
}

fn queue_pair(qp: &QpSnapshot) -> Qp {
    let connected = qp.peer_qpn != 0;
    let transport = QpType::try_from(qp.qp_type).map_or("?", QpType::name);
    Qp {
        qpn: qp.qpn,
        client: u64::from(qp.client),
        transport: transport.to_owned(),
        state: qp.state.name().to_owned(),
        peer_gid: connected.then(|| addresses::text(&qp.peer_gid)),
        peer_qpn: connected.then_some(qp.peer_qpn),
        mode: mode_name(qp.mode).to_owned(),
        path: path_name(qp.path).to_owned(),
        counters: Counters {
            tx_messages: qp.messages,
            tx_bytes: qp.bytes,
            rnr_naks: qp.rnr_naks,
            retries: qp.timeouts,
            ..Counters::default()
        },
    }
}

fn add(total: &mut Counters, one: &Counters) {
    total.tx_messages += one.tx_messages;
    total.tx_bytes += one.tx_bytes;
    total.rx_messages += one.rx_messages;
    total.rx_bytes += one.rx_bytes;
    total.rnr_naks += one.rnr_naks;
    total.retries += one.retries;
    total.errors += one.errors;
}
/// The word for what a QP's messages travel by.
fn path_name(path: Option<DataPath>) -> &'static str {
    match path {
        None => "",
        Some(DataPath::Shm) => "shm",
        Some(DataPath::Rnic) => "rnic",
        Some(DataPath::Tcp) => "tcp",
    }
}
