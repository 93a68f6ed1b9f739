//! Payload that is read straight to where it belongs: only to where it may, and its end comes last.

use super::*;
use crate::wire::{Piece, TAIL};

const LEN: usize = 20_000;

/// Two hosts, and a WRITE (or a SEND) of the one to the other as the packet that travels.
fn packet(opcode: Opcode, receives: bool) -> (Hosts, App, App, Vec<u8>) {
    let (mut hosts, mut a, b) = pair_across(QpType::Rc, |_| ());
    // The first request tells that the peer is there; from then on payload is placed.
    let mut first = send(Opcode::Write, a.sge(MAPPED, 8));
    (first.remote_addr, first.rkey) = (b.addr() + MAPPED, b.key);
    a.post(&first);
    hosts.settle();
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    fill(&mut a);
    if receives {
        b.post_recv(7, &[b.sge(MAPPED, 9000), b.sge(2 * MAPPED, 20_000)]);
    }
    let mut wqe = send(opcode, a.sge(MAPPED, LEN as u32));
    (wqe.remote_addr, wqe.rkey) = (b.addr() + MAPPED, b.key);
    a.post(&wqe);
    turn(&mut hosts.fabrics[0], 0);
    let mut bytes = Vec::new();
    assert!(hosts.fabrics[0].take_packets(STREAM, &mut bytes));
    assert_eq!(bytes.len(), packet::HEADER + LEN);
    (hosts, a, b, bytes)
}

fn aim(hosts: &mut Hosts, packet: &[u8]) -> Option<Vec<Piece>> {
    let mut pieces = Vec::new();
    let header = packet.first_chunk().unwrap();
    hosts.fabrics[1].aim(PEER, header, &mut |piece| pieces.push(piece)).then_some(pieces)
}

fn place(pieces: &[Piece], packet: &[u8]) -> Vec<(usize, usize)> {
    let mut at = packet::HEADER;
    for piece in pieces {
        // SAFETY: told by a fabric that has not changed since.
        unsafe { std::ptr::copy(packet[at..].as_ptr(), piece.start.as_ptr(), piece.len) };
        at += piece.len;
    }
    pieces.iter().map(Piece::place).collect()
}

fn commit(hosts: &mut Hosts, packet: &[u8], places: &[(usize, usize)]) {
    let tail = packet.last_chunk::<TAIL>().unwrap();
    hosts.fabrics[1].receive_placed(PEER, packet.first_chunk().unwrap(), places, tail, 0).unwrap();
}

#[test]
fn the_last_word_of_a_write_is_there_when_all_was_checked_again() {
    let (mut hosts, mut a, mut b, packet) = packet(Opcode::Write, false);
    b.bytes().fill(0xee);
    let pieces = aim(&mut hosts, &packet).expect("a place");
    let places = place(&pieces, &packet);
    let end = MAPPED as usize + LEN;
    assert_eq!(b.bytes()[end - TAIL..end], [0xee; TAIL], "it is not complete");
    assert_eq!(b.bytes()[end - TAIL - 1], a.bytes()[end - TAIL - 1]);
    commit(&mut hosts, &packet, &places);
    assert_eq!(b.bytes()[end - TAIL..end], a.bytes()[end - TAIL..end]);
    hosts.settle();
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
}

#[test]
fn a_message_is_scattered_over_its_receive_which_completes_once() {
    let (mut hosts, mut a, mut b, packet) = packet(Opcode::Send, true);
    let pieces = aim(&mut hosts, &packet).expect("a place");
    assert_eq!(pieces.len(), 2);
    assert!(b.receives.pop().is_none(), "it has not come");
    let places = place(&pieces, &packet);
    commit(&mut hosts, &packet, &places);
    let done = b.receives.pop().expect("a receive");
    assert_eq!((done.wr_id, done.status, done.byte_len), (7, 0, LEN as u32));
    let sent = a.bytes()[MAPPED as usize..][..LEN].to_vec();
    assert_eq!(b.bytes()[MAPPED as usize..][..9000], sent[..9000]);
    assert_eq!(b.bytes()[2 * MAPPED as usize..][..LEN - 9000], sent[9000..]);
    hosts.settle();
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    assert!(b.receives.pop().is_none());
}

#[test]
fn what_may_not_be_written_has_no_place() {
    // No receive, another key, a place beyond the region, a packet out of turn, a stranger.
    let (mut hosts, _a, _b, send) = packet(Opcode::Send, false);
    assert!(aim(&mut hosts, &send).is_none());
    let (mut hosts, _a, _b, write) = packet(Opcode::Write, false);
    assert!(aim(&mut hosts, &write).is_some());
    for (at, byte) in
        [(32, 0xff), (30, 0xff), (16, 0xff), (12, 0xff), (8, 0xff), (48, 9), (72, 1), (52, 0xff)]
    {
        let mut forged = write.clone();
        forged[at] ^= byte;
        assert!(aim(&mut hosts, &forged).is_none(), "byte {at}");
    }
}

#[test]
fn a_packet_whose_memory_went_while_it_came_is_not_executed() {
    let (mut hosts, mut a, mut b, packet) = packet(Opcode::Write, false);
    let pieces = aim(&mut hosts, &packet).expect("a place");
    let places = place(&pieces, &packet);
    let mut moved = places.clone();
    moved[0].0 += 64;
    let end = MAPPED as usize + LEN;
    b.bytes()[end - TAIL..end].fill(0xee);
    commit(&mut hosts, &packet, &moved);
    assert_eq!(b.bytes()[end - TAIL..end], [0xee; TAIL]);
    // The peer sends it again.
    hosts.settle();
    assert_eq!(status(a.sends.pop()), WcStatus::Success);
    let sent = a.bytes()[MAPPED as usize..][..LEN].to_vec();
    assert_eq!(b.bytes()[MAPPED as usize..][..LEN], sent);
}

#[test]
fn most_payload_of_writes_messages_and_reads_is_placed() {
    let (mut hosts, mut a, mut b) = pair_across(QpType::Rc, |_| ());
    fill(&mut a);
    b.post_recv(1, &[b.sge(MAPPED, 300_000)]);
    for opcode in [Opcode::Send, Opcode::Write, Opcode::Read] {
        let before = hosts.placed;
        let mut wqe = send(opcode, a.sge(MAPPED, 300_000));
        (wqe.remote_addr, wqe.rkey) = (b.addr() + MAPPED, b.key);
        a.post(&wqe);
        hosts.settle();
        assert_eq!(status(a.sends.pop()), WcStatus::Success);
        // The first of all told that the peer is there.
        assert!(hosts.placed - before >= 300_000 / crate::wire::SEGMENT, "{opcode:?}");
        let same = a.bytes()[MAPPED as usize..][..300_000] == b.bytes()[MAPPED as usize..][..300_000];
        assert!(same, "{opcode:?}");
    }
}
