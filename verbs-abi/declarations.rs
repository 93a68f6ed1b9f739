//! What `ffi.rs` declares, taken apart: every structure, field by field, and every constant, as a list in Rust and as
//! a C program that prints the same list as the C compiler has it. Part of the build script `../build.rs`.
//!
//! Read from the text of `ffi.rs`, so that nothing that it declares can be forgotten; what each item comes to in Rust
//! is left to rustc, which compiles the list, and what it comes to in C to the C compiler.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// A structure or union of `ffi.rs`.
#[derive(Debug, Default)]
struct Aggregate {
    /// `struct` or `union`.
    keyword: String,
    /// Names and Rust types of the fields.
    fields: Vec<(String, String)>,
}

/// All that `ffi.rs` declares.
#[derive(Debug, Default)]
pub(crate) struct Declarations {
    aggregates: BTreeMap<String, Aggregate>,
    constants: Vec<String>,
}

/// How bindgen names a type that has no name in C, and a member that has none.
const NAMELESS_TYPE: &str = "__bindgen_ty_";
const NAMELESS_MEMBER: &str = "__bindgen_anon_";
/// What bindgen puts into a structure that the header only names.
const PLACEHOLDER: &str = "_address";

impl Declarations {
    /// Reads what bindgen and rustfmt have written: a declaration at the margin, a field four columns inside.
    pub(crate) fn read(text: &str) -> Self {
        let mut all = Self::default();
        let mut current: Option<&mut Aggregate> = None;
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                ["pub", keyword @ ("struct" | "union"), name, "{"] if !line.starts_with(' ') => {
                    let aggregate = all.aggregates.entry(name.to_owned()).or_default();
                    keyword.clone_into(&mut aggregate.keyword);
                    current = Some(aggregate);
                }
                ["pub", "const", name, ..] if !line.starts_with(' ') => {
                    all.constants.push(name.trim_end_matches(':').to_owned());
                }
                ["}"] if !line.starts_with(' ') => current = None,
                _ => current.iter_mut().for_each(|aggregate| aggregate.read_field(line)),
            }
        }
        all
    }

    /// The list, as a Rust expression: pairs of an item and a number.
    pub(crate) fn in_rust(&self) -> String {
        let mut list = "&[\n".to_owned();
        let mut add = |item: &str, number: &str| {
            // Writing to a string cannot fail.
            let _ = writeln!(list, "(\"{item}\", {number} as i64),");
        };
        self.each(|item| match item {
            Item::Constant(name) => add(name, name),
            Item::Type { name, .. } => add(&format!("{name} size"), &format!("size_of::<{name}>()")),
            Item::Field { owner, path, ty, .. } => {
                let field = format!("{owner}.{}", c_path(path));
                let rust = path.join(".");
                add(&format!("{field} offset"), &format!("offset_of!({owner}, {rust})"));
                add(&format!("{field} size"), &format!("size_of::<{ty}>()"));
            }
        });
        list + "]\n"
    }

    /// The same list as a C program that prints it, an item a line.
    pub(crate) fn in_c(&self) -> String {
        let mut program = "#include <infiniband/verbs.h>\n#include <stddef.h>\n#include <stdio.h>\n\n\
                           #define SHOW(item, number) printf(\"%s %lld\\n\", item, (long long)(number))\n\n\
                           int main(void)\n{\n"
            .to_owned();
        let mut add = |item: &str, number: &str| {
            let _ = writeln!(program, "\tSHOW(\"{item}\", {number});");
        };
        self.each(|item| match item {
            Item::Constant(name) => add(name, name),
            Item::Type { name, keyword } => {
                add(&format!("{name} size"), &format!("sizeof({keyword} {name})"))
            }
            Item::Field { owner, keyword, path, .. } => {
                let path = c_path(path);
                let field = format!("{owner}.{path}");
                add(&format!("{field} offset"), &format!("offsetof({keyword} {owner}, {path})"));
                add(&format!("{field} size"), &format!("sizeof((({keyword} {owner} *)0)->{path})"));
            }
        });
        program + "\treturn 0;\n}\n"
    }

    fn each(&self, mut visit: impl FnMut(Item<'_>)) {
        self.constants.iter().for_each(|name| visit(Item::Constant(name)));
        for (name, aggregate) in &self.aggregates {
            // What has no name is reached through what holds it; of what has no field nothing is known.
            if name.contains(NAMELESS_TYPE) || aggregate.fields.is_empty() {
                continue;
            }
            let keyword = &aggregate.keyword;
            visit(Item::Type { name, keyword });
            self.each_field(aggregate, &mut Vec::new(), &mut |path, ty| {
                visit(Item::Field { owner: name, keyword, path, ty });
            });
        }
    }

    /// The fields of an aggregate and, where their type has no name, the fields of these.
    fn each_field<'a>(
        &'a self,
        aggregate: &'a Aggregate,
        path: &mut Vec<&'a str>,
        visit: &mut impl FnMut(&[&str], &str),
    ) {
        for (name, ty) in &aggregate.fields {
            let ty = ty.trim_end_matches(',');
            path.push(name);
            if !name.starts_with(NAMELESS_MEMBER) {
                visit(path, ty);
            }
            if let Some(inner) = self.aggregates.get(ty).filter(|_| ty.contains(NAMELESS_TYPE)) {
                self.each_field(inner, path, visit);
            }
            path.pop();
        }
    }
}

/// What can be compared.
enum Item<'a> {
    Constant(&'a str),
    Type { name: &'a str, keyword: &'a str },
    Field { owner: &'a str, keyword: &'a str, path: &'a [&'a str], ty: &'a str },
}

impl Aggregate {
    /// A field begins with `pub`; a type that is too long for a line goes on in the next ones.
    fn read_field(&mut self, line: &str) {
        if let Some((name, ty)) = line.strip_prefix("    pub ").and_then(|field| field.split_once(':')) {
            if name != PLACEHOLDER {
                self.fields.push((name.to_owned(), ty.trim().to_owned()));
            }
        } else if let Some((_, ty)) = self.fields.last_mut() {
            ty.push_str(line.trim());
        }
    }
}

/// The path of a field as C has it: without what bindgen named for want of a name, and without the underscore that
/// keeps a name from being a word of Rust.
fn c_path(path: &[&str]) -> String {
    let named = path.iter().filter(|field| !field.starts_with(NAMELESS_MEMBER));
    named.map(|field| field.trim_end_matches('_')).collect::<Vec<_>>().join(".")
}
