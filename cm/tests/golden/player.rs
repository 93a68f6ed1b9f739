//! Replays recordings: several processes on one host, each command compared with what was recorded.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    path::Path,
    time::Duration,
};

use cm::{Manager, Place, Settings};
use verbs_abi::{
    ids,
    proto::cm::{Address, CmAnswer, CmOption, Command, ConnParam, Event, EventParam, Route},
    proto::{Gid, QpAttr},
};

use super::line::{Line, address, number};

/// The recordings' host: RoCE v2 of its IPv4 address is the second GID.
const HOST: &str = "10.9.0.1";
/// Lines tried without progress before a replay is given up.
const PATIENCE: usize = 10_000;

/// Replays the recordings of several processes against one manager.
pub(crate) fn play(name: &str, files: &[&str]) {
    let settings = Settings { seed: 7, ids: 100, tenant_ids: 60_000, channels: 20, mtu: 3 };
    let mut stage = Stage { manager: Manager::new(settings), chosen: HashMap::new() };
    let mut processes: Vec<Process> = files.iter().zip(1..).map(|(file, n)| Process::load(file, n)).collect();
    for process in &processes {
        let gid = |ip: &str| ids::Gid::from(ip.parse::<std::net::IpAddr>().unwrap()).0;
        let place = Place { tenant: 0, namespace: 1, gids: vec![gid("fe80::1"), gid(HOST)] };
        stage.manager.open(process.client, place);
    }
    for _ in 0..PATIENCE {
        if processes.iter().all(|process| process.lines.is_empty()) {
            return;
        }
        // Data went over a connection before its end, so that others got as far as they could.
        let ends = |process: &Process| process.lines.front().is_some_and(|line| line.command == "DISCONNECT");
        let moved = processes.iter_mut().any(|process| !ends(process) && stage.step(process, false));
        let moved = moved || processes.iter_mut().any(|process| stage.step(process, false));
        // All wait for events: a second thread of one of them wrote its command before the first one read.
        let moved = moved || processes.iter_mut().any(|process| stage.step(process, true));
        assert!(moved, "{name}: everybody waits, first for {:?}", processes[0].lines.front());
    }
    panic!("{name}: the replay does not end");
}

struct Process {
    client: u32,
    lines: VecDeque<Line>,
    /// Recorded ids to ours.
    ids: HashMap<u64, u32>,
    /// The channels of our ids. The recordings do not name them; a channel for each created id will do.
    on: HashMap<u32, u32>,
    next_channel: u32,
    /// Channels to which ids migrated, by their recorded descriptors.
    migrated: HashMap<u64, u32>,
    /// The id that listens, and the one that was created last.
    listener: u32,
    newest: u32,
}

impl Process {
    fn load(file: &str, client: u32) -> Process {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file);
        let text = std::fs::read_to_string(path).expect("the recording is there");
        let lines = text.lines().map(Line::parse).filter(|line| line.ok).collect();
        Process {
            client,
            lines,
            ids: HashMap::new(),
            on: HashMap::new(),
            next_channel: 0,
            migrated: HashMap::new(),
            listener: 0,
            newest: 0,
        }
    }

    fn id(&self, line: &Line) -> u32 {
        self.ids[&line.number("id")]
    }

    /// Our id whose channel has the event of a line.
    fn owner(&self, line: &Line) -> u32 {
        match line.word.as_str() {
            "CONNECT_REQUEST" => self.listener,
            "MULTICAST_JOIN" => self.newest,
            _ => self.ids[&number(line.tell("id").unwrap())],
        }
    }
}

struct Stage {
    manager: Manager,
    /// What was recorded of what machines choose, to what was chosen here: the same each time.
    chosen: HashMap<(&'static str, u64), u64>,
}

impl Stage {
    /// Replays the next line of a process, or with `ahead` the next that is no wait. Whether there was one.
    fn step(&mut self, process: &mut Process, ahead: bool) -> bool {
        let waits = |line: &Line| line.command == "GET_EVENT";
        let at = if ahead { process.lines.iter().position(|line| !waits(line)) } else { Some(0) };
        let Some(line) = at.and_then(|at| process.lines.get(at)).cloned() else { return false };
        let done = match waits(&line) {
            true => self.event(process, &line),
            false => {
                self.command(process, &line);
                true
            }
        };
        if done {
            process.lines.remove(at.unwrap());
        }
        while let Some(message) = self.manager.next_message() {
            self.manager.receive(message, Duration::ZERO);
        }
        done
    }

    fn ask(&mut self, process: &Process, channel: u32, command: Command, line: &Line) -> CmAnswer {
        let answer = self.manager.handle(process.client, channel, command, Duration::ZERO);
        answer.unwrap_or_else(|refusal| panic!("{refusal}: {}", line.text))
    }

    fn command(&mut self, process: &mut Process, line: &Line) {
        match line.command.as_str() {
            "CREATE_ID" => {
                let channel = self.open_channel(process);
                let (space, qp_type) = (line.number("ps") as u16, line.number("qpt") as u8);
                let command = Command::CreateId { uid: 0xabc, space, qp_type };
                let CmAnswer::Id(id) = self.ask(process, channel, command, line) else {
                    panic!("{}", line.text)
                };
                process.ids.insert(number(line.tell("id").unwrap()), id);
                process.on.insert(id, channel);
                process.newest = id;
            }
            "LEAVE_MCAST" => {
                let channel = process.on[&process.newest];
                let answer = self.ask(process, channel, Command::LeaveMulticast { id: 0 }, line);
                assert_eq!(answer, CmAnswer::Reported { events: 1, revoked: 0 });
            }
            "MIGRATE_ID" => self.migrate(process, line),
            _ => {
                let id = process.id(line);
                if line.command == "LISTEN" {
                    process.listener = id;
                }
                let answer = self.ask(process, process.on[&id], command(id, line), line);
                self.check(line, answer);
            }
        }
    }

    fn open_channel(&mut self, process: &mut Process) -> u32 {
        process.next_channel += 1;
        self.manager.open_channel(process.client, process.next_channel).unwrap();
        process.next_channel
    }

    fn migrate(&mut self, process: &mut Process, line: &Line) {
        let (id, descriptor) = (process.id(line), line.number("tofd"));
        let to = match process.migrated.get(&descriptor) {
            Some(channel) => *channel,
            None => self.open_channel(process),
        };
        process.migrated.insert(descriptor, to);
        let from = process.on[&id];
        let answer = self.ask(process, to, Command::MigrateId { id, from }, line);
        process.on.insert(id, to);
        self.check(line, answer);
    }

    /// The next event of the channel that had it, if there is one.
    fn event(&mut self, process: &mut Process, line: &Line) -> bool {
        let channel = process.on[&process.owner(line)];
        let CmAnswer::Event(Some(event)) = self.ask(process, channel, Command::NextEvent, line) else {
            return false;
        };
        let named = number(line.tell("id").unwrap());
        if line.word == "CONNECT_REQUEST" {
            process.ids.insert(named, event.id);
            process.on.insert(event.id, channel);
        } else if line.word != "MULTICAST_JOIN" {
            assert_eq!(process.ids[&named], event.id, "{}", line.text);
        }
        self.check_event(line, &event);
        true
    }

    fn check(&mut self, line: &Line, answer: CmAnswer) {
        match answer {
            CmAnswer::Reported { events, .. } => same(line, "events_reported", u64::from(events)),
            CmAnswer::Route(route) => self.check_route(line, &route),
            CmAnswer::QpAttr { mask, attr } => self.check_attributes(line, mask, &attr),
            CmAnswer::Done | CmAnswer::Id(_) | CmAnswer::Event(_) => {}
        }
    }

    fn check_event(&mut self, line: &Line, event: &Event) {
        let name = format!("{:?}", event.kind);
        let expected = line.word.replace('_', "").to_lowercase();
        assert_eq!(name.to_lowercase(), expected, "{}", line.text);
        same(line, "status", event.status as u64);
        assert_eq!(line.tell("uid") == Some("set"), event.uid != 0, "{}", line.text);
        match &event.param {
            EventParam::Conn(param) => {
                same(line, "conn.qpn", param.qpn.into());
                same(line, "conn.rr", param.responder_resources.into());
                same(line, "conn.id", param.initiator_depth.into());
                same(line, "conn.fc", param.flow_control.into());
                same(line, "conn.rc", param.retry_count.into());
                same(line, "conn.rnr", param.rnr_retry_count.into());
                same(line, "conn.srq", param.srq.into());
                same(line, "conn.priv", param.private_data.len() as u64);
            }
            EventParam::Ud(param) => {
                same(line, "ud.qpn", param.qpn.into());
                let qkey = line.tell("ud.qkey").map(|text| u64::from_str_radix(text, 16).unwrap());
                assert!(qkey.is_none_or(|qkey| qkey == param.qkey.into()), "{}", line.text);
                same_gid(line, "ud.dgid", param.ah.dgid);
                same(line, "ud.sgidx", param.ah.sgid_index.into());
                same(line, "ud.port", param.ah.port_num.into());
                same(line, "ud.dlid", param.ah.dlid.into());
                same(line, "ud.priv", param.private_data.len() as u64);
            }
        }
    }

    fn check_route(&mut self, line: &Line, route: &Route) {
        let known = route.device.is_some();
        if let Some(guid) = line.tell("guid") {
            assert_eq!(known, guid != "0000000000000000", "{}", line.text);
        }
        match line.word.as_str() {
            "ADDR" => {
                self.same_address(line, "src", route.source);
                self.same_address(line, "dst", route.destination);
            }
            "GID" => {
                let [sgid, dgid] = route.device.unwrap_or_default();
                same_gid(line, "src.gid", sgid);
                same_gid(line, "dst.gid", dgid);
            }
            "PATH" => {
                same(line, "n", route.path.is_some().into());
                let Some(path) = route.path else { return };
                let [sgid, dgid] = route.device.unwrap();
                same_gid(line, "sgid", sgid);
                same_gid(line, "dgid", dgid);
                same(line, "mtu", 0x80 | u64::from(path.mtu));
                same(line, "plt", 0x80 | u64::from(path.life_time));
                let sid = line.tell("sid").map(|text| u64::from_str_radix(text, 16).unwrap());
                assert_eq!(sid, Some(path.sid), "{}", line.text);
            }
            other => panic!("what is {other}? {}", line.text),
        }
    }

    /// Addresses are the same, but for ports that the kernel chose.
    fn same_address(&mut self, line: &Line, name: &str, ours: Option<Address>) {
        let recorded = address(line.tell(name).unwrap());
        match (recorded, ours) {
            (Some(Address::Ip(recorded)), Some(Address::Ip(ours))) => {
                assert_eq!(recorded.ip(), ours.ip(), "{}", line.text);
                self.same_port(line, recorded, ours);
            }
            (Some(Address::Ib(_)), Some(Address::Ib(_))) => {}
            (recorded, ours) => panic!("{recorded:?} is not {ours:?}: {}", line.text),
        }
    }

    fn same_port(&mut self, line: &Line, recorded: SocketAddr, ours: SocketAddr) {
        if recorded.port() < 32_768 {
            assert_eq!(recorded.port(), ours.port(), "{}", line.text);
        } else {
            self.same_choice(line, "port", recorded.port().into(), ours.port().into());
        }
    }

    fn same_choice(&mut self, line: &Line, what: &'static str, recorded: u64, ours: u64) {
        let known = *self.chosen.entry((what, recorded)).or_insert(ours);
        assert_eq!(known, ours, "{what} of {}", line.text);
    }

    fn check_attributes(&mut self, line: &Line, mask: u32, attr: &QpAttr) {
        same(line, "mask", mask.into());
        same(line, "state", attr.qp_state.into());
        same(line, "pkey_idx", attr.pkey_index.into());
        same(line, "port", attr.port_num.into());
        same(line, "acc", attr.qp_access_flags.into());
        same(line, "qkey", attr.qkey.into());
        same(line, "mtu", attr.path_mtu.into());
        same(line, "dqpn", attr.dest_qp_num.into());
        for (name, ours) in [("rqpsn", attr.rq_psn), ("sqpsn", attr.sq_psn)] {
            let recorded = number(line.tell(name).unwrap());
            assert_eq!(recorded == 0, ours == 0, "{name} of {}", line.text);
            self.same_choice(line, "psn", recorded, ours.into());
        }
        same(line, "rdat", attr.max_rd_atomic.into());
        same(line, "drdat", attr.max_dest_rd_atomic.into());
        same(line, "rnrt", attr.min_rnr_timer.into());
        same(line, "tmo", attr.timeout.into());
        same(line, "rc", attr.retry_cnt.into());
        same(line, "rnr", attr.rnr_retry.into());
        same(line, "ah.glob", attr.ah_attr.is_global.into());
        same_gid(line, "ah.dgid", attr.ah_attr.dgid);
        same(line, "ah.sgidx", attr.ah_attr.sgid_index.into());
        same(line, "ah.hop", attr.ah_attr.hop_limit.into());
        same(line, "ah.sl", attr.ah_attr.sl.into());
        same(line, "ah.port", attr.ah_attr.port_num.into());
        same(line, "ah.rate", attr.ah_attr.static_rate.into());
    }
}

/// The command that a line records.
fn command(id: u32, line: &Line) -> Command {
    match line.command.as_str() {
        "DESTROY_ID" => Command::DestroyId { id },
        "BIND" => Command::Bind { id, address: address(line.ask("addr")).unwrap() },
        "RESOLVE_ADDR" => Command::ResolveAddr {
            id,
            source: address(line.ask("src")),
            destination: address(line.ask("dst")).unwrap(),
            timeout_ms: line.number("tmo") as u32,
        },
        "RESOLVE_ROUTE" => Command::ResolveRoute { id },
        "QUERY" => Command::Query { id },
        "INIT_QP_ATTR" => Command::InitQpAttr { id, state: line.number("state") as u32 },
        "LISTEN" => Command::Listen { id, backlog: line.number("backlog") as u32 },
        "CONNECT" => Command::Connect { id, param: conn_param(line) },
        "ACCEPT" => {
            let valid = line.number("valid") == 1;
            Command::Accept { id, uid: 0xdef, param: valid.then(|| conn_param(line)) }
        }
        "DISCONNECT" => Command::Disconnect { id },
        "SET_OPTION" => Command::SetOption { id, option: CmOption::ReuseAddr(true) },
        "JOIN_MCAST" => Command::JoinMulticast {
            id,
            uid: 0xfed,
            address: address(line.ask("addr")).unwrap(),
            send_only: false,
        },
        other => panic!("what is {other}? {}", line.text),
    }
}

/// What was recorded of the parameters; retries are not told of an acceptance.
fn conn_param(line: &Line) -> ConnParam {
    let connects = line.command == "CONNECT";
    // The name `id` is the id's and the initiator depth's; the second one counts.
    let depth = line.text.split(" id=").nth(2).and_then(|rest| rest.split(' ').next()).map(number);
    ConnParam {
        qpn: line.number("qpn") as u32,
        responder_resources: line.number("rr") as u8,
        initiator_depth: depth.unwrap() as u8,
        flow_control: if connects { line.number("fc") as u8 } else { 1 },
        retry_count: if connects { line.number("rc") as u8 } else { 0 },
        rnr_retry_count: line.number("rnr") as u8,
        private_data: vec![7; line.number("priv") as usize],
        ..ConnParam::default()
    }
}

/// A recorded number is ours, where it was recorded.
fn same(line: &Line, name: &str, ours: u64) {
    // rstream offers flow control, and the recording of an acceptance does not say whether it does.
    let unknown = name == "conn.fc" && line.word == "CONNECT_RESPONSE";
    if let Some(recorded) = line.tell(name).filter(|_| !unknown) {
        assert_eq!(number(recorded), ours, "{name} of {}", line.text);
    }
}

fn same_gid(line: &Line, name: &str, ours: Gid) {
    let Some(recorded) = line.tell(name) else { return };
    let recorded: std::net::Ipv6Addr = recorded.parse().expect("a GID");
    assert_eq!(recorded.octets(), ours, "{name} of {}", line.text);
}
