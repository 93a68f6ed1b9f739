//! Multicast groups of datagram QPs.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Result, ensure};
use verbs_abi::ffi::*;

use crate::{
    buffer::pattern,
    pair::{End, Pair, QKEY, QUIET, Setup, ah_attr},
    qp::{Qp, QpInit, Send},
    verbs::{Ah, Errno},
};

const GRH: usize = 40;
const INBOX: usize = 64 << 10;
/// What a datagram to a group is sent to.
const EVERYBODY: u32 = 0x00ff_ffff;

/// The group of an IPv4 address, as RoCE v2 has it.
fn group(last: u8) -> [u8; 16] {
    Ipv4Addr::new(239, 1, 2, last).to_ipv6_mapped().octets()
}

fn send_to(from: &End, group: [u8; 16], len: usize, qkey: u32) -> Result<()> {
    let ah = Ah::new(&from.pd, &ah_attr(group, 0))?;
    let mut work = Send::new(IBV_WR_SEND_WITH_IMM).sge(from.sge(0, len)).imm(0x0102_0304);
    work.to = Some((&ah, EVERYBODY, qkey));
    from.execute(&work)?;
    Ok(())
}

/// Takes the datagram of `len` bytes that `from` sent to a group.
fn take(at: &End, from: &End, group: [u8; 16], data: &[u8]) -> Result<()> {
    let got = at.received()?;
    let expected = (GRH + data.len(), from.qp.number(), IBV_WC_GRH | IBV_WC_WITH_IMM);
    ensure!((got.byte_len as usize, got.src_qp, got.flags) == expected && got.imm == 0x0102_0304, "{got:?}");
    ensure!(at.buffer.read(INBOX + GRH, data.len()) == data, "it brought other bytes");
    // The header is IPv4's or IPv6's, as the sender's address is.
    let (header, source) = (at.buffer.read(INBOX, GRH), from.address()?.gid);
    let is_ipv4 = Ipv6Addr::from(source).to_ipv4_mapped().is_some();
    let (first, last) = if is_ipv4 { (32, 36) } else { (8, 24) };
    ensure!(header[last..] == group[16 - (40 - last)..], "the header leads elsewhere: {header:x?}");
    ensure!(
        header[first..last] == source[16 - (last - first)..],
        "the header's sender is another: {header:x?}"
    );
    Ok(())
}

pub(crate) fn delivered() -> Result<()> {
    let pair = Pair::of(IBV_QPT_UD)?;
    let (a, b) = (&pair.a, &pair.b);
    let other = Pair::of(IBV_QPT_UD)?;
    let (c, d) = (&other.a, &other.b);
    let all = [a, b, c, d];
    // Three of four, the sender among them.
    let members = [a, b, c];
    members.iter().try_for_each(|end| end.qp.attach(group(1)))?;
    d.qp.attach(group(2))?;
    for len in [0, 1, 1000, 4096] {
        let data = pattern(len as u64, len);
        a.buffer.write(0, &data);
        for end in all {
            end.qp.recv(5, &[end.sge(INBOX, 8192)])?;
        }
        send_to(a, group(1), len, QKEY)?;
        members.iter().try_for_each(|end| take(end, a, group(1), &data))?;
        d.recv_cq.stays_empty(QUIET)?;
        send_to(b, group(2), len, QKEY)?;
        d.received()?;
    }
    // Of another Q_Key, to a group of nobody, and once the last member has left.
    for end in all {
        end.qp.recv(6, &[end.sge(INBOX, 8192)])?;
    }
    send_to(a, group(1), 10, QKEY + 1)?;
    send_to(a, group(3), 10, QKEY)?;
    members.iter().try_for_each(|end| end.qp.detach(group(1)))?;
    d.qp.detach(group(2))?;
    send_to(a, group(1), 10, QKEY)?;
    all.iter().try_for_each(|end| end.recv_cq.stays_empty(QUIET))
}

pub(crate) fn not_its_own() -> Result<()> {
    let pair = Pair::of(IBV_QPT_UD)?;
    let (a, b) = (&pair.a, &pair.b);
    let flag = IBV_QP_CREATE_BLOCK_SELF_MCAST_LB;
    let init = |qp_type| QpInit { qp_type, cap: Setup::new(qp_type).cap, sq_sig_all: true };
    ensure!(Qp::with_flags(&a.pd, &a.recv_cq, init(IBV_QPT_RC), flag).is_err(), "an RC QP took the flag");
    let qp = Qp::with_flags(&a.pd, &a.recv_cq, init(IBV_QPT_UD), flag)?;
    for (attr, mask) in [a.init_attr(), a.rtr_attr(b.address()?), a.rts_attr()] {
        qp.modify(&attr, mask)?;
    }
    qp.attach(group(1))?;
    b.qp.attach(group(1))?;
    qp.recv(1, &[a.sge(INBOX, 8192)])?;
    b.qp.recv(2, &[b.sge(INBOX, 8192)])?;
    let ah = Ah::new(&a.pd, &ah_attr(group(1), 0))?;
    let mut work = Send::new(IBV_WR_SEND).id(3).sge(a.sge(0, 10));
    work.to = Some((&ah, EVERYBODY, QKEY));
    qp.send(&work)?;
    ensure!(a.recv_cq.next()?.wr_id == 3 && b.received()?.src_qp == qp.number());
    a.recv_cq.stays_empty(QUIET)?;
    // What others send it does get.
    send_to(b, group(1), 10, QKEY)?;
    ensure!(a.recv_cq.next()?.wr_id == 1);
    qp.detach(group(1))?;
    Ok(b.qp.detach(group(1))?)
}

fn refused(result: Result<(), Errno>, code: i32, what: &str) -> Result<()> {
    ensure!(result.is_err_and(|errno| errno.code == code), "{what}: {result:?} in place of errno {code}");
    Ok(())
}

pub(crate) fn attachments() -> Result<()> {
    let end = End::new(&Setup::new(IBV_QPT_UD))?;
    // In RESET, and again: it stays attached once.
    end.qp.attach(group(1))?;
    end.qp.attach(group(1))?;
    end.qp.attach([0xff; 16])?;
    refused(end.qp.detach(group(2)), libc::EINVAL, "leaving a group that was not joined")?;
    refused(end.qp.attach(end.address()?.gid), libc::EINVAL, "joining an address")?;
    refused(end.qp.try_destroy(), libc::EBUSY, "destroying a member")?;
    end.qp.detach(group(1))?;
    refused(end.qp.detach(group(1)), libc::EINVAL, "leaving twice")?;
    refused(end.qp.try_destroy(), libc::EBUSY, "destroying a member")?;
    end.qp.detach([0xff; 16])?;
    let connected = End::new(&Setup::new(IBV_QPT_RC))?;
    refused(connected.qp.attach(group(1)), libc::EINVAL, "joining with an RC QP")?;
    // More groups than the device has are refused, and leaving makes room.
    let attr = end.context.device_attr()?;
    ensure!(attr.max_mcast_grp > 0 && attr.max_mcast_qp_attach > 0, "no groups: {attr:?}");
    ensure!(attr.max_total_mcast_qp_attach >= attr.max_mcast_grp, "{attr:?}");
    let nth = |n: i32| -> [u8; 16] {
        let mut gid = [0xff; 16];
        gid[12..].copy_from_slice(&n.to_be_bytes());
        gid
    };
    for n in 0..attr.max_total_mcast_qp_attach {
        end.qp.attach(nth(n))?;
    }
    refused(end.qp.attach(group(1)), libc::ENOMEM, "joining one more")?;
    end.qp.detach(nth(0))?;
    end.qp.attach(group(1))?;
    end.qp.detach(group(1))?;
    (1..attr.max_total_mcast_qp_attach).try_for_each(|n| Ok(end.qp.detach(nth(n))?))
}
