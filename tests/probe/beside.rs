//! A device of the kernel and `ff0` in one process, which share memory.

use std::ffi::CString;

use anyhow::{Context as _, Result, ensure};
use verbs_abi::ffi::IBV_QPT_RC;

use crate::{
    buffer::{Buffer, pattern},
    checks::{read_from, write_to},
    pair::{End, Pair, Setup},
    verbs::{ALL_ACCESS, Context, Mr},
};

const PAGE: usize = 4096;
const LEN: usize = 8 * PAGE;

/// What one device writes the program and the other device see, whichever of them registers the memory first, and whichever
/// gives it back first.
pub(crate) fn beside(name: &str, gid_index: u8) -> Result<()> {
    let context = Context::open_named(&CString::new(name)?)?;
    let setup = Setup { gid_index, initiator_depth: 1, responder_depth: 1, ..Setup::new(IBV_QPT_RC) };
    let virt = Pair::of(IBV_QPT_RC)?;
    for round in 0..3_u8 {
        let seed = 10 * u64::from(round);
        let buffer = Buffer::new(LEN)?;
        buffer.fill(0, LEN, round);
        // Nothing is pinned, so these pages move to where the router maps them.
        ensure!(pinned_pages()? == 0, "something of this process is pinned already");
        let moved = register(&virt, &buffer)?;
        let real = Pair { a: End::on(&context, &setup)?, b: End::on(&context, &setup)? };
        real.a.connect(real.b.address()?).with_context(|| format!("a QP of {name}"))?;
        real.b.connect(real.a.address()?)?;
        let pinned = register(&real, &buffer).with_context(|| format!("registration with {name}"))?;
        ensure!(pinned_pages()? > 0, "{name} pins nothing");
        let both = Both { real: &real, virt: &virt, buffer: &buffer };
        both.see("registered with ff0 first", &pinned, &moved, seed)?;
        drop(moved);
        both.arrives("given back by ff0 first", &real, &pinned, seed + 1)?;
        let moved = register(&virt, &buffer)?;
        both.see("registered with the kernel's device first", &pinned, &moved, seed + 2)?;
        drop(pinned);
        both.arrives("given back by the kernel's device first", &virt, &moved, seed + 3)?;
        let pinned = register(&real, &buffer)?;
        both.see("registered with ff0 first, and never moved", &pinned, &moved, seed + 4)?;
        drop(moved);
        both.arrives("given back by ff0 and still pinned", &real, &pinned, seed + 5)?;
    }
    Ok(())
}

/// What the kernel counts as pinned in this process, kB.
fn pinned_pages() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:")).context("no VmPin")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

fn register(pair: &Pair, buffer: &Buffer) -> Result<Mr> {
    // Pages that are owned in part among them.
    Ok(Mr::new(&pair.b.pd, buffer.addr() + 100, LEN - 200, ALL_ACCESS)?)
}

/// Connected QPs of both devices, and the memory that they share.
struct Both<'a> {
    real: &'a Pair,
    virt: &'a Pair,
    buffer: &'a Buffer,
}

impl Both<'_> {
    /// What a device writes the program has.
    fn arrives(&self, when: &str, pair: &Pair, mr: &Mr, seed: u64) -> Result<()> {
        let data = pattern(seed, LEN - 200);
        write_to(&pair.a, self.buffer.addr() + 100, mr.rkey(), &data)?;
        ensure!(self.buffer.read(100, LEN - 200) == data, "{when}: what was written is lost ({seed})");
        Ok(())
    }

    /// Each device has what the other one wrote, and what the program did.
    fn see(&self, when: &str, pinned: &Mr, moved: &Mr, seed: u64) -> Result<()> {
        let all = |pair: &Pair, mr: &Mr| read_from(&pair.a, self.buffer.addr() + 100, mr.rkey(), LEN - 200);
        let own = pattern(seed + 1000, LEN - 200);
        self.buffer.write(100, &own);
        for (device, pair, mr) in [("the kernel's device", self.real, pinned), ("ff0", self.virt, moved)] {
            ensure!(all(pair, mr)? == own, "{when}: {device} does not see what the program wrote ({seed})");
        }
        self.arrives(when, self.real, pinned, seed + 2000)?;
        ensure!(
            all(self.virt, moved)? == pattern(seed + 2000, LEN - 200),
            "{when}: ff0 sees other bytes ({seed})"
        );
        self.arrives(when, self.virt, moved, seed + 3000)?;
        ensure!(
            all(self.real, pinned)? == pattern(seed + 3000, LEN - 200),
            "{when}: the kernel's device sees other bytes ({seed})"
        );
        Ok(())
    }
}
