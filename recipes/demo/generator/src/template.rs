//! Templates: `(every|each) {D}` has alternatives in parentheses and slots in braces.
//! They do not know what a slot stands for.

use crate::rng::Rng;

/// One way through the alternatives.
pub fn vary(rng: &mut Rng, template: &str) -> String {
    tidy(&walk(rng, template))
}

fn walk(rng: &mut Rng, template: &str) -> String {
    let mut out = String::new();
    let mut rest = template;
    while let Some(open) = rest.find('(') {
        let (choices, after) = group(&rest[open..]);
        out.push_str(&rest[..open]);
        let choice = *rng.choose(&choices);
        out.push_str(&walk(rng, choice));
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Splits `(a|b)rest` into its choices and the rest; groups may nest.
fn group(text: &str) -> (Vec<&str>, &str) {
    let (mut depth, mut from, mut choices) = (0, 1, Vec::new());
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            '|' if depth == 1 => {
                choices.push(&text[from..at]);
                from = at + 1;
            }
            ')' if depth == 1 => {
                choices.push(&text[from..at]);
                return (choices, &text[at + 1..]);
            }
            ')' => depth -= 1,
            _ => {}
        }
    }
    panic!("a template with an open group: {text}")
}

/// Puts `value` where the slot `{name}` stands.
pub fn fill(text: &str, name: &str, value: &str) -> String {
    text.replace(&format!("{{{name}}}"), value)
}

/// Single spaces, and none before a comma: empty alternatives leave some behind.
pub fn tidy(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace(" ,", ",")
}

/// Every way through the alternatives.
#[cfg(test)]
pub fn all(template: &str) -> Vec<String> {
    fn raw(template: &str) -> Vec<String> {
        let Some(open) = template.find('(') else { return vec![template.to_owned()] };
        let (choices, after) = group(&template[open..]);
        let tails = raw(after);
        let heads = choices.iter().flat_map(|choice| raw(choice));
        heads
            .flat_map(|head| {
                tails.iter().map(move |tail| format!("{head}{tail}")).collect::<Vec<_>>()
            })
            .map(|end| format!("{}{end}", &template[..open]))
            .collect()
    }
    raw(template).iter().map(|text| tidy(text)).collect()
}

#[test]
fn alternatives_nest_and_empty_ones_leave_no_gap() {
    assert_eq!(all("(a|(b|c) d|) e, f"), ["a e, f", "b d e, f", "c d e, f", "e, f"]);
    let all = all("x (a|b(c|)) y");
    let mut rng = Rng::new(1);
    assert!((0..50).all(|_| all.contains(&vary(&mut rng, "x (a|b(c|)) y"))));
}
