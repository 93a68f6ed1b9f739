//! Promise: whatever clients ask in whatever order, nothing panics, every ring has its event, and what ends leaves
//! nothing behind.

#![allow(clippy::unwrap_used, reason = "a test")]

mod bed;

use std::time::Duration;

use bed::{Bed, CHANNEL, ip, param, place};
use cm::space;
use proptest::prelude::*;
use verbs_abi::proto::cm::{CmAnswer, CmOption, Command};

const CLIENTS: u32 = 3;

fn command() -> impl Strategy<Value = Command> {
    let id = 0_u32..6;
    let address = prop_oneof![
        Just("10.0.0.1:7000"),
        Just("10.0.0.2:7000"),
        Just("0.0.0.0:7000"),
        Just("0.0.0.0:0"),
        Just("127.0.0.1:7000"),
        Just("[::]:7000"),
        Just("239.0.0.1:0"),
    ];
    let space = prop_oneof![3 => Just(space::TCP), 2 => Just(space::UDP), 1 => Just(space::IB)];
    let commands = (id, address, space, 0_u8..20, any::<bool>());
    commands.prop_map(|(id, address, space, which, flag)| match which {
        0 | 1 => Command::CreateId { uid: 1, space, qp_type: 2 },
        2 => Command::DestroyId { id },
        3 => Command::Bind { id, address: ip(address) },
        4 | 5 => Command::ResolveAddr { id, source: None, destination: ip(address), timeout_ms: 10 },
        6 => Command::ResolveRoute { id },
        7 => Command::Query { id },
        8 | 9 => Command::Connect { id, param: param(1) },
        10 | 11 => Command::Listen { id, backlog: flag.into() },
        12 => Command::Accept { id, uid: 2, param: flag.then(|| param(2)) },
        13 => Command::Reject { id, reason: 0, private_data: vec![1] },
        14 => Command::Disconnect { id },
        15 => Command::InitQpAttr { id, state: 1 + u32::from(flag) },
        16 => Command::NextEvent,
        17 => Command::SetOption { id, option: CmOption::ReuseAddr(flag) },
        18 => Command::JoinMulticast { id, uid: 3, address: ip(address), send_only: false },
        _ => Command::LeaveMulticast { id },
    })
}

/// How many events a step has taken out of the channel of its client.
fn taken(answer: &CmAnswer) -> i64 {
    match answer {
        CmAnswer::Event(Some(_)) => 1,
        CmAnswer::Reported { revoked, .. } => (*revoked).into(),
        _ => 0,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn every_ring_has_its_event_and_ends_are_clean(
        steps in prop::collection::vec((1..=CLIENTS, command(), 0_u64..40), 1..200),
    ) {
        let mut bed = Bed::new();
        bed.open(3, place(0, 1, &["10.0.0.1"]));
        let mut rung = vec![0_i64; CLIENTS as usize + 1];
        for (client, command, wait) in steps {
            if let Ok(answer) = bed.ask(client, command) {
                rung[client as usize] -= taken(&answer);
            }
            bed.pass(Duration::from_secs(wait / 35 * 40));
            for (client, channel) in bed.manager.take_rings() {
                prop_assert_eq!(channel, CHANNEL);
                rung[client as usize] += 1;
            }
        }
        for client in 1..=CLIENTS {
            let left = std::iter::from_fn(|| bed.event(client)).count() as i64;
            prop_assert_eq!(left, rung[client as usize], "events of client {}", client);
        }
        (1..=CLIENTS).for_each(|client| bed.manager.close(client));
        bed.settle();
        bed.pass(Duration::from_secs(3));
        prop_assert_eq!(bed.manager.listeners().count(), 0);
        prop_assert_eq!(bed.manager.deadline(), None);
        prop_assert!(bed.manager.is_empty());
    }
}
