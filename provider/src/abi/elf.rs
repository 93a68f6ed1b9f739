//! Objects that the dynamic linker has loaded: finding one by its SONAME, its version nodes and its imports.
//!
//! Only reads. What is read stays valid while the object stays loaded, which is the caller's to ensure
//! ([`super::library::Library`] pins what it finds).

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ops::Range;
use std::slice;

use libc::{Elf64_Phdr, Elf64_Rela, Elf64_Sym, dl_phdr_info};

use super::edge;

#[cfg(not(target_pointer_width = "64"))]
compile_error!("the provider reads ELF64 objects only");

#[cfg(target_arch = "x86_64")]
const IMPORT_RELOCATIONS: [u32; 2] = [6, 7]; // R_X86_64_GLOB_DAT, R_X86_64_JUMP_SLOT
#[cfg(target_arch = "aarch64")]
const IMPORT_RELOCATIONS: [u32; 2] = [1025, 1026]; // R_AARCH64_GLOB_DAT, R_AARCH64_JUMP_SLOT

const DT_NULL: i64 = 0;
const DT_PLTRELSZ: i64 = 2;
const DT_STRTAB: i64 = 5;
const DT_SYMTAB: i64 = 6;
const DT_RELA: i64 = 7;
const DT_RELASZ: i64 = 8;
const DT_SONAME: i64 = 14;
const DT_JMPREL: i64 = 23;
const DT_VERDEF: i64 = 0x6fff_fffc;
const DT_VERDEFNUM: i64 = 0x6fff_fffd;

/// No object has as many dynamic entries or version nodes; a loop past it reads something else.
const MAX_ENTRIES: usize = 4096;

#[repr(C)]
struct Elf64Dyn {
    tag: i64,
    value: usize,
}

#[repr(C)]
struct Elf64Verdef {
    version: u16,
    flags: u16,
    index: u16,
    names: u16,
    hash: u32,
    first_name: u32,
    next: u32,
}

/// A loaded object.
#[derive(Debug, Clone)]
pub(crate) struct Object {
    /// The name by which `dlopen` knows it: its path.
    pub(crate) path: CString,
    /// What its load segments span.
    pub(crate) image: Range<usize>,
    /// What the dynamic linker made read-only after relocation; empty if nothing.
    pub(crate) relro: Range<usize>,
    base: usize,
    dynamic: Dynamic,
}

/// A function or variable that an object takes from others.
#[derive(Debug)]
pub(crate) struct Import<'a> {
    /// Its symbol name, without version.
    pub(crate) name: &'a CStr,
    /// The word that holds its address.
    pub(crate) slot: *mut *mut c_void,
}

impl Object {
    /// The first loaded object with this SONAME, in the caller's link namespace.
    pub(crate) fn find(soname: &CStr) -> Option<Object> {
        let mut search = Search { soname, found: None };
        // SAFETY: `visit` has the callback's signature and is given the pointer to a live `Search`.
        unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut search).cast()) };
        search.found
    }

    /// The names of the version nodes that it defines.
    pub(crate) fn version_nodes(&self) -> Vec<&CStr> {
        let mut nodes = Vec::new();
        let mut definition = self.dynamic.version_definitions;
        if definition == 0 {
            return nodes;
        }
        for _ in 0..self.dynamic.version_count.min(MAX_ENTRIES) {
            // SAFETY: DT_VERDEF heads a chain of DT_VERDEFNUM definitions, each followed at `first_name` by the
            // name's offset in the string table; all of it is in the loaded, read-only image.
            unsafe {
                let entry = (definition as *const Elf64Verdef).read_unaligned();
                let name = (definition + entry.first_name as usize) as *const u32;
                nodes.push(self.dynamic.string(name.read_unaligned() as usize));
                definition += entry.next as usize;
            }
        }
        nodes
    }

    /// What it imports, function slots first.
    pub(crate) fn imports(&self) -> impl Iterator<Item = Import<'_>> {
        self.dynamic.plt_relocations().iter().chain(self.dynamic.relocations()).filter_map(|relocation| {
            let (kind, symbol) = (relocation.r_info as u32, (relocation.r_info >> 32) as usize);
            if !IMPORT_RELOCATIONS.contains(&kind) {
                return None;
            }
            // SAFETY: a relocation names an entry of the object's own symbol table, whose name is an offset in its
            // string table.
            let name = unsafe { self.dynamic.string((*self.dynamic.symbols.add(symbol)).st_name as usize) };
            Some(Import { name, slot: (self.base + relocation.r_offset as usize) as *mut *mut c_void })
        })
    }
}

struct Search<'a> {
    soname: &'a CStr,
    found: Option<Object>,
}

/// Called by the dynamic linker for each object, under its lock: must call none of its functions.
unsafe extern "C" fn visit(info: *mut dl_phdr_info, _size: usize, search: *mut c_void) -> c_int {
    edge::value(0, || {
        // SAFETY: `find` passed a live `Search` that nobody else uses meanwhile.
        let search = unsafe { &mut *search.cast::<Search<'_>>() };
        // SAFETY: the dynamic linker passes a description that is valid for this call.
        search.found = unsafe { object(&*info, search.soname) };
        c_int::from(search.found.is_some())
    })
}

/// # Safety
/// `info` must describe a loaded object.
unsafe fn object(info: &dl_phdr_info, soname: &CStr) -> Option<Object> {
    if info.dlpi_phdr.is_null() || info.dlpi_name.is_null() {
        return None;
    }
    // SAFETY: the caller's promise: `dlpi_phnum` headers at `dlpi_phdr`.
    let headers = unsafe { slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)) };
    let base = info.dlpi_addr as usize;
    let dynamic = span(base, headers, libc::PT_DYNAMIC)?;
    // SAFETY: PT_DYNAMIC of a loaded object is its dynamic section.
    let dynamic = unsafe { Dynamic::read(base, dynamic) }?;
    // SAFETY: DT_SONAME is an offset in the object's string table.
    if unsafe { dynamic.string(dynamic.soname?) } != soname {
        return None;
    }
    // SAFETY: `dlpi_name` is a C string that lives as long as the object.
    let path = unsafe { CStr::from_ptr(info.dlpi_name) }.to_owned();
    let image = span(base, headers, libc::PT_LOAD)?;
    let relro = span(base, headers, libc::PT_GNU_RELRO).unwrap_or(0..0);
    Some(Object { path, image, relro, base, dynamic })
}

/// What the segments of a kind span in memory.
fn span(base: usize, headers: &[Elf64_Phdr], kind: u32) -> Option<Range<usize>> {
    let of_kind = headers.iter().filter(|header| header.p_type == kind);
    let ends = of_kind.map(|header| {
        let start = base + header.p_vaddr as usize;
        (start, start + header.p_memsz as usize)
    });
    ends.reduce(|(start, end), (s, e)| (start.min(s), end.max(e))).map(|(start, end)| start..end)
}

/// The parts of a dynamic section that are used, as addresses.
#[derive(Debug, Clone)]
struct Dynamic {
    strings: *const c_char,
    symbols: *const Elf64_Sym,
    soname: Option<usize>,
    relocations: (usize, usize),
    plt_relocations: (usize, usize),
    version_definitions: usize,
    version_count: usize,
}

impl Dynamic {
    /// # Safety
    /// `section` must be the dynamic section of an object loaded at `base`.
    unsafe fn read(base: usize, section: Range<usize>) -> Option<Dynamic> {
        let limit = (section.len() / size_of::<Elf64Dyn>()).min(MAX_ENTRIES);
        // SAFETY: the caller's promise; the section is readable and aligned.
        let entries = unsafe { slice::from_raw_parts(section.start as *const Elf64Dyn, limit) };
        let value = |tag| {
            entries.iter().take_while(|entry| entry.tag != DT_NULL).find(|e| e.tag == tag).map(|e| e.value)
        };
        // The dynamic linker relocates these addresses in place, but not those of the vDSO.
        let address = |tag| value(tag).map(|v| if v < base { v + base } else { v });
        let table =
            |start, size| (address(start).unwrap_or(0), value(size).unwrap_or(0) / size_of::<Elf64_Rela>());
        Some(Dynamic {
            strings: address(DT_STRTAB)? as *const c_char,
            symbols: address(DT_SYMTAB)? as *const Elf64_Sym,
            soname: value(DT_SONAME),
            relocations: table(DT_RELA, DT_RELASZ),
            plt_relocations: table(DT_JMPREL, DT_PLTRELSZ),
            version_definitions: address(DT_VERDEF).unwrap_or(0),
            version_count: value(DT_VERDEFNUM).unwrap_or(0),
        })
    }

    /// # Safety
    /// `offset` must be taken from the object's own tables.
    unsafe fn string(&self, offset: usize) -> &CStr {
        // SAFETY: the caller's promise; strings of the table end in a zero byte and live as long as the object.
        unsafe { CStr::from_ptr(self.strings.add(offset)) }
    }

    fn relocations(&self) -> &[Elf64_Rela] {
        Self::table(self.relocations)
    }

    fn plt_relocations(&self) -> &[Elf64_Rela] {
        Self::table(self.plt_relocations)
    }

    fn table<'a>((address, count): (usize, usize)) -> &'a [Elf64_Rela] {
        if address == 0 || count == 0 {
            return &[];
        }
        // SAFETY: the dynamic section says that `count` entries lie at `address`, in the read-only image.
        unsafe { slice::from_raw_parts(address as *const Elf64_Rela, count) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libc_is_found_with_its_version_nodes_and_imports() {
        let libc = Object::find(c"libc.so.6").expect("every test program has a libc");
        assert!(libc.version_nodes().contains(&c"GLIBC_2.17"));
        assert!(libc.image.contains(&(libc::dl_iterate_phdr as *const () as usize)));
        assert!(libc.relro.start >= libc.image.start && libc.relro.end <= libc.image.end + 4096);
        let import = libc.imports().next().expect("libc takes some things from the dynamic linker");
        assert!(libc.image.contains(&(import.slot as usize)));
    }

    #[test]
    fn an_absent_object_is_not_found() {
        assert!(Object::find(c"libnothing.so.1").is_none());
    }
}
