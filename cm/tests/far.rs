//! Promise: two managers with a link between them that loses, repeats and breaks do what one does: every event once,
//! nothing left behind, and what a peer router makes up is not believed.

#![allow(clippy::unwrap_used, reason = "a test")]

mod bed;

use std::{
    collections::VecDeque,
    net::IpAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bed::{CHANNEL, PORT, data, ip, param, place};
use cm::{Body, CommId, Manager, Message, Offer, Refusal, Routes, Settings, reason, space};
use proptest::prelude::*;
use verbs_abi::proto::cm::{CmAnswer, Command, Event, EventKind};

const SERVER: usize = 0;
const CLIENT: usize = 1;
/// Each host has one client, with this number, at the address of its host.
const PROCESS: u32 = 7;
const ADDRESSES: [&str; 2] = ["10.0.0.1", "10.0.0.2"];
/// How each host names the other.
const OTHER: u32 = 3;
/// As long as anything is waited for.
const LONG: Duration = Duration::from_secs(70);

/// The addresses of the other host, once they are known.
#[derive(Debug)]
struct Directory {
    far: Mutex<Vec<IpAddr>>,
    own: IpAddr,
}

impl Routes for Directory {
    fn host(&self, tenant: u32, ip: IpAddr) -> Option<u32> {
        (tenant == 0 && self.far.lock().unwrap().contains(&ip)).then_some(OTHER)
    }

    fn is_published(&self, tenant: u32, ip: IpAddr) -> bool {
        tenant == 0 && ip == self.own
    }
}

/// What happens to a message on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Arrives,
    Lost,
    Twice,
    /// Once more, much later.
    Late,
}

struct Hosts {
    managers: [Manager; 2],
    directories: [Arc<Directory>; 2],
    now: Duration,
    /// Of the messages to come; all others arrive.
    fates: VecDeque<Fate>,
    late: Vec<(usize, Message)>,
    /// Every message that was sent, and by whom.
    sent: Vec<(usize, Message)>,
}

fn manager(seed: u64, at: usize, directory: &Arc<Directory>) -> Manager {
    let mut manager = Manager::new(Settings { seed, ids: 3000, tenant_ids: 3000, channels: 4, mtu: 5 });
    manager.set_routes(Arc::clone(directory) as Arc<_>);
    manager.open(PROCESS, place(0, at as u64, &["10.9.9.9", ADDRESSES[at]]));
    manager.open_channel(PROCESS, CHANNEL).unwrap();
    manager
}

impl Hosts {
    fn new() -> Self {
        let parse = |at: usize| ADDRESSES[at].parse::<IpAddr>().unwrap();
        let directory = |at| Arc::new(Directory { far: Mutex::new(vec![parse(1 - at)]), own: parse(at) });
        let directories = [directory(0), directory(1)];
        let managers = [manager(1, 0, &directories[0]), manager(2, 1, &directories[1])];
        Self {
            managers,
            directories,
            now: Duration::ZERO,
            fates: VecDeque::new(),
            late: Vec::new(),
            sent: Vec::new(),
        }
    }

    fn with_fates(fates: &[Fate]) -> Self {
        Self { fates: fates.iter().copied().collect(), ..Self::new() }
    }

    fn ask(&mut self, at: usize, command: Command) -> Result<CmAnswer, Refusal> {
        let answer = self.managers[at].handle(PROCESS, CHANNEL, command, self.now);
        self.settle();
        answer
    }

    /// Delivers what is under way.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            let next = (0..2).find_map(|at| Some((at, self.managers[at].next_message()?)));
            let Some((from, message)) = next else { return };
            if message.towards == 0 {
                self.managers[from].receive(message, self.now);
                continue;
            }
            assert_eq!(message.towards, OTHER);
            self.sent.push((from, message.clone()));
            let fate = self.fates.pop_front().unwrap_or(Fate::Arrives);
            if fate != Fate::Lost {
                self.carry(from, &message);
            }
            match fate {
                Fate::Twice => self.carry(from, &message),
                Fate::Late => self.late.push((from, message)),
                Fate::Arrives | Fate::Lost => {}
            }
        }
        panic!("they never come to rest");
    }

    /// As two routers do it.
    fn carry(&mut self, from: usize, message: &Message) {
        let words = message.to_words();
        assert!(words.len() <= 300, "{} bytes", words.len());
        let ips = [message.source.ip(), message.destination.ip()];
        assert_eq!(
            ips[0].to_string(),
            ADDRESSES[from],
            "nobody speaks from an address that is not published"
        );
        let arrived = Message::from_words(&words, OTHER, message.tenant, ips).unwrap();
        self.managers[1 - from].receive(arrived, self.now);
    }

    fn deliver_late(&mut self) {
        for (from, message) in std::mem::take(&mut self.late) {
            self.carry(from, &message);
            self.settle();
        }
    }

    fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        for _ in 0..10_000 {
            let due = self.managers.iter().filter_map(Manager::deadline).min();
            let Some(due) = due.filter(|due| *due <= until) else {
                self.now = until;
                return;
            };
            self.now = self.now.max(due);
            let now = self.now;
            self.managers.iter_mut().for_each(|manager| manager.tick(now));
            self.settle();
        }
        panic!("something is due for ever");
    }

    fn event(&mut self, at: usize) -> Option<Event> {
        match self.ask(at, Command::NextEvent) {
            Ok(CmAnswer::Event(event)) => event,
            other => panic!("{other:?}"),
        }
    }

    /// The next event, at once or after some time.
    fn expect(&mut self, at: usize, kind: EventKind) -> Event {
        for _ in 0..100 {
            if let Some(event) = self.event(at) {
                assert_eq!(event.kind, kind, "{event:?}");
                return event;
            }
            self.pass(Duration::from_secs(1));
        }
        panic!("no {kind:?} at {at}");
    }

    fn create(&mut self, at: usize, space: u16) -> u32 {
        match self.ask(at, Command::CreateId { uid: 1000, space, qp_type: 2 }) {
            Ok(CmAnswer::Id(id)) => id,
            other => panic!("{other:?}"),
        }
    }

    fn listen(&mut self, space: u16, backlog: u32) -> u32 {
        let id = self.create(SERVER, space);
        self.ask(SERVER, Command::Bind { id, address: ip(&format!("0.0.0.0:{PORT}")) }).unwrap();
        self.ask(SERVER, Command::Listen { id, backlog }).unwrap();
        id
    }

    fn connect(&mut self, space: u16) -> u32 {
        let id = self.create(CLIENT, space);
        let destination = ip(&format!("{}:{PORT}", ADDRESSES[SERVER]));
        let resolve = Command::ResolveAddr { id, source: None, destination, timeout_ms: 1000 };
        self.ask(CLIENT, resolve).unwrap();
        self.expect(CLIENT, EventKind::AddrResolved);
        self.ask(CLIENT, Command::ResolveRoute { id }).unwrap();
        self.expect(CLIENT, EventKind::RouteResolved);
        self.ask(CLIENT, Command::Connect { id, param: param(2) }).unwrap();
        id
    }

    /// The numbers of both ends of a new connection, the server's first.
    fn connected(&mut self) -> [u32; 2] {
        let active = self.connect(space::TCP);
        let request = self.expect(SERVER, EventKind::ConnectRequest);
        assert_eq!(&data(&request)[..4], &[2, 2, 2, 0]);
        self.ask(SERVER, Command::Accept { id: request.id, uid: 5, param: Some(param(1)) }).unwrap();
        let response = self.expect(CLIENT, EventKind::ConnectResponse);
        assert_eq!(&data(&response)[..4], &[1, 1, 1, 0]);
        self.ask(CLIENT, Command::Accept { id: active, uid: 0, param: None }).unwrap();
        self.expect(SERVER, EventKind::Established);
        [request.id, active]
    }

    fn disconnect(&mut self, at: usize, ids: [u32; 2]) {
        let other = 1 - at;
        self.ask(at, Command::Disconnect { id: ids[at] }).unwrap();
        assert_eq!(self.expect(other, EventKind::Disconnected).status, 0);
        self.ask(other, Command::Disconnect { id: ids[other] }).unwrap();
        assert_eq!(self.expect(at, EventKind::Disconnected).status, 0);
        self.expect(at, EventKind::TimewaitExit);
        self.expect(other, EventKind::TimewaitExit);
    }

    /// Nothing more is told, and nothing left when both processes are gone.
    fn end(&mut self) {
        for at in 0..2 {
            assert_eq!(self.event(at), None, "at {at}");
            self.managers[at].close(PROCESS);
        }
        self.settle();
        self.pass(LONG);
        self.deliver_late();
        self.pass(LONG);
        for manager in &self.managers {
            assert!(manager.is_empty(), "{manager:#?}");
            assert_eq!(manager.deadline(), None);
        }
    }
}

/// A whole life, whatever happens on the way.
fn live(hosts: &mut Hosts) {
    hosts.listen(space::TCP, 8);
    let ids = hosts.connected();
    hosts.deliver_late();
    hosts.disconnect(CLIENT, ids);
    hosts.deliver_late();
    hosts.end();
}

#[test]
fn a_connection_between_hosts_is_made_and_ended_with_five_messages() {
    let mut hosts = Hosts::new();
    live(&mut hosts);
    let senders: Vec<usize> = hosts.sent.iter().map(|(from, _)| *from).collect();
    // REQ, REP, RTU, DREQ, DREP.
    assert_eq!(senders, [CLIENT, SERVER, CLIENT, CLIENT, SERVER]);
}

#[test]
fn whichever_message_is_lost_repeated_or_late_each_end_hears_everything_once() {
    for fate in [Fate::Lost, Fate::Twice, Fate::Late] {
        for nth in 0..5 {
            let mut fates = vec![Fate::Arrives; nth];
            fates.push(fate);
            let mut hosts = Hosts::with_fates(&fates);
            live(&mut hosts);
            assert!(hosts.fates.is_empty());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn any_mixture_of_losses_and_repetitions_does_no_harm(
        fates in prop::collection::vec(
            prop_oneof![
                2 => Just(Fate::Arrives), 2 => Just(Fate::Lost), 1 => Just(Fate::Twice), 1 => Just(Fate::Late)
            ],
            0..24,
        ),
    ) {
        live(&mut Hosts::with_fates(&fates));
    }

    #[test]
    fn words_that_are_no_message_are_none(words in prop::collection::vec(any::<u8>(), 0..400)) {
        let ips = [ADDRESSES[1].parse().unwrap(), ADDRESSES[0].parse().unwrap()];
        if let Some(message) = Message::from_words(&words, OTHER, 0, ips) {
            let mut hosts = Hosts::new();
            hosts.listen(space::TCP, 8);
            hosts.managers[SERVER].receive(message, hosts.now);
            hosts.settle();
        }
    }
}

#[test]
fn a_new_link_says_at_once_what_was_not_answered() {
    let mut hosts = Hosts::with_fates(&[Fate::Lost]);
    hosts.listen(space::TCP, 8);
    hosts.connect(space::TCP);
    assert_eq!(hosts.event(SERVER), None);
    hosts.managers[CLIENT].link_up(OTHER + 1, hosts.now);
    hosts.settle();
    assert_eq!(hosts.event(SERVER), None, "that was another host");
    hosts.managers[CLIENT].link_up(OTHER, hosts.now);
    hosts.settle();
    assert_eq!(hosts.event(SERVER).map(|event| event.kind), Some(EventKind::ConnectRequest));
}

#[test]
fn who_is_never_answered_asks_a_bounded_number_of_times_and_hears_that_nobody_is_there() {
    for space in [space::TCP, space::UDP] {
        let mut hosts = Hosts::with_fates(&[Fate::Lost; 100]);
        let id = hosts.connect(space);
        hosts.pass(Duration::from_secs(67));
        assert_eq!(hosts.event(CLIENT), None);
        let asked = hosts.sent.len();
        assert!((16..=24).contains(&asked), "{asked} times");
        assert_eq!(hosts.expect(CLIENT, EventKind::Unreachable).status, -110);
        hosts.ask(CLIENT, Command::DestroyId { id }).unwrap();
        hosts.end();
    }
}

#[test]
fn a_refusal_arrives_with_its_reason_and_is_told_again_also_when_the_end_is_gone() {
    for destroyed in [false, true] {
        let mut hosts = Hosts::with_fates(&[Fate::Arrives, Fate::Lost, Fate::Arrives, Fate::Lost]);
        hosts.listen(space::TCP, 8);
        hosts.connect(space::TCP);
        let id = hosts.expect(SERVER, EventKind::ConnectRequest).id;
        hosts.ask(SERVER, Command::Reject { id, reason: 0, private_data: vec![8; 5] }).unwrap();
        if destroyed {
            hosts.ask(SERVER, Command::DestroyId { id }).unwrap();
        }
        let event = hosts.expect(CLIENT, EventKind::Rejected);
        assert_eq!(event.status, i32::from(reason::CONSUMER_DEFINED));
        assert_eq!(&data(&event)[..6], &[8, 8, 8, 8, 8, 0]);
        hosts.end();
    }
    let mut hosts = Hosts::new();
    hosts.connect(space::TCP);
    assert_eq!(hosts.expect(CLIENT, EventKind::Rejected).status, i32::from(reason::INVALID_SERVICE_ID));
}

#[test]
fn datagrams_are_agreed_on_also_when_the_answer_is_lost() {
    let mut hosts = Hosts::with_fates(&[Fate::Lost, Fate::Twice, Fate::Lost, Fate::Late]);
    hosts.listen(space::UDP, 8);
    hosts.connect(space::UDP);
    let id = hosts.expect(SERVER, EventKind::ConnectRequest).id;
    hosts.ask(SERVER, Command::Accept { id, uid: 5, param: Some(param(1)) }).unwrap();
    hosts.ask(SERVER, Command::DestroyId { id }).unwrap();
    let event = hosts.expect(CLIENT, EventKind::Established);
    assert_eq!(&data(&event)[..4], &[1, 1, 1, 0]);
    hosts.end();
}

#[test]
fn whoever_disconnects_from_a_host_that_is_gone_hears_so_in_the_end() {
    let mut hosts = Hosts::new();
    hosts.listen(space::TCP, 8);
    let ids = hosts.connected();
    hosts.fates = vec![Fate::Lost; 100].into();
    hosts.pass(LONG);
    assert_eq!(hosts.event(CLIENT), None, "a wire says nothing by itself");
    hosts.ask(CLIENT, Command::Disconnect { id: ids[CLIENT] }).unwrap();
    hosts.pass(Duration::from_secs(67));
    assert_eq!(hosts.event(CLIENT), None);
    assert_eq!(hosts.expect(CLIENT, EventKind::Disconnected).status, -110);
}

#[test]
fn the_death_of_a_process_is_told_although_the_link_is_away_for_a_while() {
    let mut hosts = Hosts::new();
    hosts.listen(space::TCP, 8);
    hosts.connected();
    hosts.fates = [Fate::Lost; 3].into();
    hosts.managers[CLIENT].close(PROCESS);
    hosts.settle();
    assert_eq!(hosts.event(SERVER), None);
    hosts.expect(SERVER, EventKind::Disconnected);
    hosts.pass(LONG);
    assert!(hosts.managers[CLIENT].is_empty(), "it is not said for ever");
    assert_eq!(hosts.managers[CLIENT].deadline(), None);
}

#[test]
fn the_successor_of_a_router_is_not_taken_for_it() {
    let mut hosts = Hosts::new();
    hosts.listen(space::TCP, 8);
    let [passive, _] = hosts.connected();
    hosts.managers[CLIENT] = manager(77, CLIENT, &hosts.directories[CLIENT]);
    hosts.connected();
    hosts.ask(SERVER, Command::Disconnect { id: passive }).unwrap();
    assert_eq!(hosts.expect(SERVER, EventKind::Disconnected).status, 0, "nobody there knows of it");
    assert_eq!(hosts.event(CLIENT), None);
}

#[test]
fn an_address_that_nobody_knows_is_looked_for_and_one_that_is_unpublished_is_nobodys_source() {
    let mut hosts = Hosts::new();
    let directory = Arc::clone(&hosts.directories[CLIENT]);
    directory.far.lock().unwrap().clear();
    let resolve = |hosts: &mut Hosts, source: Option<&str>| {
        let id = hosts.create(CLIENT, space::TCP);
        let destination = ip(&format!("{}:{PORT}", ADDRESSES[SERVER]));
        let command = Command::ResolveAddr { id, source: source.map(ip), destination, timeout_ms: 2000 };
        hosts.ask(CLIENT, command).unwrap();
    };
    resolve(&mut hosts, None);
    hosts.pass(Duration::from_secs(1));
    assert_eq!(hosts.event(CLIENT), None);
    directory.far.lock().unwrap().push(ADDRESSES[SERVER].parse().unwrap());
    hosts.pass(Duration::from_millis(300));
    assert_eq!(hosts.event(CLIENT).map(|event| event.kind), Some(EventKind::AddrResolved));
    resolve(&mut hosts, Some("127.0.0.1:0"));
    assert_eq!(hosts.expect(CLIENT, EventKind::AddrError).status, -110, "loopback ends here");
    assert_eq!(hosts.managers[CLIENT].deadline(), None);
}

/// A request that a host makes up.
fn made_up(serial: u64) -> Message {
    let offer = Offer { qpn: 1, ..Offer::default() };
    Message {
        towards: 0,
        tenant: 0,
        from: CommId { host: OTHER, serial },
        namespace: None,
        source: format!("{}:9", ADDRESSES[CLIENT]).parse().unwrap(),
        destination: format!("{}:{PORT}", ADDRESSES[SERVER]).parse().unwrap(),
        body: Body::ConnectRequest { space: space::TCP, offer },
    }
}

#[test]
fn a_flood_of_requests_from_a_host_is_bounded_by_the_backlog() {
    let mut hosts = Hosts::new();
    hosts.listen(space::TCP, 4);
    for serial in 0..20_000 {
        hosts.managers[SERVER].receive(made_up(serial), hosts.now);
    }
    let mut refused = 0;
    while let Some(message) = hosts.managers[SERVER].next_message() {
        assert!(matches!(message.body, Body::Reject { reason: reason::NO_RESOURCES, .. }), "{message:?}");
        refused += 1;
    }
    assert_eq!(refused, 20_000 - 4 - 1024);
    assert_eq!(hosts.managers[SERVER].id_count(PROCESS), 1 + 4);
}

#[test]
fn what_a_host_makes_up_is_not_believed() {
    let mut hosts = Hosts::new();
    hosts.listen(space::TCP, 8);
    hosts.connected();
    let honest = hosts.sent[0].1.from.serial;
    let ends: Vec<u64> = hosts.sent.iter().map(|(_, message)| message.from.serial).collect();
    for to in ends {
        let to = CommId { host: 0, serial: to };
        for body in [
            Body::DisconnectRequest { to },
            Body::DisconnectReply { to },
            Body::Reject { to, reason: 1, private_data: Vec::new() },
            Body::Withdraw { space: space::TCP },
        ] {
            let other_address = "10.0.0.77:9".parse().unwrap();
            for forged in [
                Message { body: body.clone(), ..made_up(honest + 1) },
                Message { body: body.clone(), tenant: 1, ..made_up(honest) },
                Message { body: body.clone(), source: other_address, ..made_up(honest) },
                Message { body, from: CommId { host: OTHER + 1, serial: honest }, ..made_up(0) },
            ] {
                for at in 0..2 {
                    hosts.managers[at].receive(forged.clone(), hosts.now);
                    while hosts.managers[at].next_message().is_some() {}
                }
            }
        }
    }
    assert_eq!((hosts.event(SERVER), hosts.event(CLIENT)), (None, None));
}

#[test]
fn numbers_lengths_and_addresses_are_checked() {
    let ips = [ADDRESSES[1].parse().unwrap(), ADDRESSES[0].parse().unwrap()];
    let good = made_up(1);
    assert!(Message::from_words(&good.to_words(), OTHER, 0, ips).is_some());
    let offer = |change: fn(&mut Offer)| {
        let mut offer = Offer::default();
        change(&mut offer);
        Message { body: Body::ConnectRequest { space: space::TCP, offer }, ..made_up(1) }
    };
    for bad in [
        offer(|offer| offer.qpn = 1 << 24),
        offer(|offer| offer.psn = u32::MAX),
        offer(|offer| offer.private_data = vec![0; 57]),
    ] {
        assert_eq!(Message::from_words(&bad.to_words(), OTHER, 0, ips), None, "{bad:?}");
    }
    let longer = [good.to_words(), vec![0]].concat();
    assert_eq!(Message::from_words(&longer, OTHER, 0, ips), None);
    for odd in ["127.0.0.1", "0.0.0.0", "239.0.0.1", "::1"] {
        let odd = odd.parse().unwrap();
        for ips in [[odd, ips[1]], [ips[0], odd]] {
            assert_eq!(Message::from_words(&good.to_words(), OTHER, 0, ips), None, "{odd}");
        }
    }
}
