//! Each type against paper, against ggml's own bytes, and against itself in other widths.

use std::path::Path;

use checkpoint::weights::Weights;

use super::*;

const QUANTISED: [Type; 7] =
    [Type::Q4_0, Type::Q5_0, Type::Q5_1, Type::Q8_0, Type::Q4K, Type::Q5K, Type::Q6K];

fn encoded(values: &[f32], kind: Type) -> Result<Vec<u8>, Wrong> {
    let mut out = vec![0xA5; kind.row_bytes(values.len())];
    rows(values, kind, &mut out).map(|()| out)
}

/// Made by golden/make_blocks.py.
fn golden() -> Weights {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/worker/golden/blocks.safetensors");
    Weights::open_file(&path).unwrap()
}

#[test]
fn bytes_are_those_that_ggml_makes() {
    let golden = golden();
    let values = golden.get("values").unwrap().to_f32().unwrap();
    for kind in QUANTISED {
        let expected = golden.get(kind.name()).unwrap().data;
        let found = encoded(&values, kind).unwrap();
        assert_eq!(found.len(), expected.len());
        let bytes = kind.row_bytes(256);
        for (row, (found, expected)) in found.chunks(bytes).zip(expected.chunks(bytes)).enumerate()
        {
            assert_eq!(found, expected, "{} of row {row}", kind.name());
        }
    }
}

/// What a machine without wide vectors does, and one block without others beside it.
#[test]
fn bytes_are_the_same_in_every_width() {
    fn check<E: Encoder>(values: &[f32]) {
        let (len, bytes) = E::BLOCK;
        let mut found = [(); 5].map(|()| vec![0xA5; values.len() / len * bytes]);
        assert!(super::encoded::<E>(values, &mut found[0]));
        any::<E, 8>(values, &mut found[1]);
        any::<E, 16>(values, &mut found[2]);
        any::<E, 32>(values, &mut found[3]);
        for (values, out) in values.chunks(256).zip(found[4].chunks_mut(256 / len * bytes)) {
            any::<E, 32>(values, out);
        }
        assert!(found.iter().all(|other| *other == found[0]));
    }
    let golden = golden();
    let values = golden.get("values").unwrap().to_f32().unwrap();
    check::<blocks::Q4_0>(&values);
    check::<blocks::Q5_0>(&values);
    check::<blocks::Q5_1>(&values);
    check::<blocks::Q8_0>(&values);
    check::<k::Affine<4>>(&values);
    check::<k::Affine<5>>(&values);
    check::<k::Symmetric>(&values);
}

/// Blocks whose scale is an exact power of two or zero, so that each level is known on paper.
#[test]
fn q8_0_is_what_paper_says() {
    let mut block = [0.0f32; 32];
    assert_eq!(encoded(&block, Type::Q8_0).unwrap(), [0; 34]);
    // d = 127 / 127 = 1: halves go away from zero.
    block[..9].copy_from_slice(&[127.0, 0.5, -0.5, 1.5, -1.5, 2.5, 0.49, -126.5, 126.4]);
    let bytes = encoded(&block, Type::Q8_0).unwrap();
    assert_eq!(bytes[..2], [0x00, 0x3C]);
    let levels: Vec<i8> = bytes[2..].iter().map(|b| *b as i8).collect();
    assert_eq!(levels[..9], [127, 1, -1, 2, -2, 3, 0, -127, 126]);
    assert!(levels[9..].iter().all(|l| *l == 0));
    // d = 0.25, the largest is negative.
    block = [0.0; 32];
    block[30] = -31.75;
    block[31] = 10.0;
    let bytes = encoded(&block, Type::Q8_0).unwrap();
    assert_eq!((bytes[..2].to_vec(), bytes[32] as i8, bytes[33] as i8), (vec![0, 0x34], -127, 40));
}

#[test]
fn what_does_not_fit_is_told() {
    let with = |x: f32| [&[1.0; 299][..], &[x], &[1.0; 212]].concat();
    for kind in [&[Type::F32, Type::F16, Type::BF16][..], &QUANTISED].concat() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let wrong = encoded(&with(bad), kind).unwrap_err();
            assert!(matches!(wrong, Wrong::NotFinite { at: 299, .. }), "{wrong:?}");
        }
    }
    assert!(encoded(&with(f32::MAX), Type::F32).is_ok());
    // What goes and what does not, as its scale as f16 is an infinity. That of the last few follows
    // from trials, and so is not known to the last bit.
    for (kind, fits, too_large) in [
        (Type::F16, -65519.9, -65520.0),
        (Type::BF16, f32::from_bits(0x7F7F_7FFF), f32::from_bits(0x7F7F_8000)),
        (Type::Q4_0, 8.0 * 65519.9, 8.0 * 65520.0),
        (Type::Q5_0, -16.0 * 65519.9, -16.0 * 65520.0),
        (Type::Q5_1, -65519.9, -65520.0),
        (Type::Q5_1, 31.0 * 65519.9, 31.0 * 65520.0 + 1.0),
        (Type::Q8_0, 127.0 * 65519.9, 127.0 * 65520.0),
        (Type::Q4K, 5.6e7, 6.5e7),
        (Type::Q4K, -4.0e6, -4.3e6),
        (Type::Q5K, 1.2e8, 1.35e8),
        (Type::Q6K, 2.6e8, 2.8e8),
    ] {
        assert!(encoded(&with(fits), kind).is_ok(), "{}: {fits}", kind.name());
        for value in [too_large, too_large.signum() * f32::MAX] {
            let wrong = encoded(&with(value), kind);
            assert_eq!(wrong, Err(Wrong::TooLarge { at: 299, value }), "{}", kind.name());
        }
    }
}
