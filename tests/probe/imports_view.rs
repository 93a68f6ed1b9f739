//! The imports of libibverbs and librdmacm, looked at from outside: which of them lead into the provider.

use std::{fs::File, os::unix::fs::FileExt};

use anyhow::{Context as _, Result, ensure};

use crate::{cm::Channel, verbs::Context};

const LIBRARIES: [&str; 2] = ["/libibverbs.so.1", "/librdmacm.so.1"];
const PROVIDER: &str = "/libfreeflow-rdmav";

/// A mapping of a file in this process.
struct Mapping {
    from: u64,
    to: u64,
    is_code: bool,
    file: String,
}

/// Opens the device and an event channel, and prints how many words of the two libraries' own data are addresses of
/// the provider's code. Everything else that they know of the provider lies on the heap or is no code.
pub(crate) fn count() -> Result<()> {
    let _device = Context::open()?;
    let _channel = Channel::new()?;
    let maps = mappings()?;
    let memory = File::open("/proc/self/mem")?;
    let code: Vec<&Mapping> = maps.iter().filter(|map| map.is_code && map.file.contains(PROVIDER)).collect();
    ensure!(!code.is_empty(), "the provider is not loaded");
    for library in LIBRARIES {
        let mut data = maps.iter().filter(|map| !map.is_code && map.file.contains(library)).peekable();
        ensure!(data.peek().is_some(), "{library} is not loaded");
        let mut count = 0;
        for map in data {
            let mut bytes = vec![0; (map.to - map.from) as usize];
            memory.read_exact_at(&mut bytes, map.from).with_context(|| format!("cannot read {library}"))?;
            let words =
                bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap_or_default()));
            count += words.filter(|word| code.iter().any(|map| (map.from..map.to).contains(word))).count();
        }
        println!("{} {count}", library.trim_start_matches('/'));
    }
    Ok(())
}

fn mappings() -> Result<Vec<Mapping>> {
    let text = std::fs::read_to_string("/proc/self/maps")?;
    let lines = text.lines().filter(|line| line.contains('/'));
    lines.map(|line| mapping(line).with_context(|| format!("no mapping: {line}"))).collect()
}

/// A line of `/proc/self/maps`: range, rights, offset, device, inode, file.
fn mapping(line: &str) -> Option<Mapping> {
    let mut words = line.split_whitespace();
    let (from, to) = words.next()?.split_once('-')?;
    let rights = words.next()?;
    let file = line.get(line.find('/')?..)?.to_owned();
    let number = |text| u64::from_str_radix(text, 16).ok();
    // What may not be read holds no imports.
    let is_code = rights.contains('x') || !rights.contains('r');
    Some(Mapping { from: number(from)?, to: number(to)?, is_code, file })
}
