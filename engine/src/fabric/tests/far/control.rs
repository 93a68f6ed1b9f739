//! Words of the hosts: they arrive as they were said, from whom they claim to be, or not at all.

use std::sync::Mutex;

use super::*;

#[derive(Debug, Default)]
struct Ear {
    heard: Mutex<Vec<Control>>,
    links: Mutex<Vec<u32>>,
}

impl Controls for Ear {
    fn arrived(&self, control: Control) {
        self.heard.lock().unwrap().push(control);
    }

    fn link_up(&self, peer: u32) {
        self.links.lock().unwrap().push(peer);
    }
}

fn hosts() -> (Hosts, Arc<Ear>) {
    let mut hosts = Hosts::new();
    let ear = Arc::<Ear>::default();
    hosts.fabrics[1].set_controls(Arc::clone(&ear) as Arc<_>);
    (hosts, ear)
}

fn words(from: u32, words: &[u8]) -> Control {
    Control { peer: PEER, tenant: 0, source: gid(from), destination: gid(11), words: words.to_vec() }
}

#[test]
fn words_need_a_link_and_arrive_in_order() {
    let (mut hosts, ear) = hosts();
    assert!(!hosts.fabrics[0].send_control(&words(1, b"lost")));
    assert_eq!(hosts.fabrics[0].next_call(), Some(STREAM), "the host is asked for a link");
    hosts.connect();
    assert_eq!(*ear.links.lock().unwrap(), [PEER]);
    let all = [words(1, b""), words(2, b"two"), words(1, &[7; MAX_WORDS])];
    all.iter().for_each(|control| assert!(hosts.fabrics[0].send_control(control)));
    hosts.settle();
    assert_eq!(*ear.heard.lock().unwrap(), all);
}

#[test]
fn a_host_speaks_for_its_own_addresses_and_with_measure() {
    let (mut hosts, ear) = hosts();
    hosts.connect();
    let foreign = Control { source: gid(12), ..words(1, b"forged") };
    hosts.fabrics[0].send_control(&foreign);
    hosts.fabrics[0].send_control(&Control { tenant: 3, ..words(1, b"of a tenant that the other has not") });
    assert!(!hosts.fabrics[0].send_control(&words(1, &[7; MAX_WORDS + 1])));
    hosts.settle();
    assert_eq!(*ear.heard.lock().unwrap(), []);
    let full = (0..2000).filter(|_| hosts.fabrics[0].send_control(&words(1, &[7; MAX_WORDS]))).count();
    assert!(full < 2000, "what nobody takes does not grow");
    hosts.settle();
    assert_eq!(ear.heard.lock().unwrap().len(), full);
}
