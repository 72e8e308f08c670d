//! The instruction sets that kernels are written for, chosen once, when a decoder or encoder is made.

/// An instruction set that has kernels of its own. Every one gives the same bits. Only [`Isa::supported`] and [`Isa::detect`] make those
/// that not every CPU has, so whoever holds one may use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// Plain loops, the twin that the others are tested against.
    Scalar,
    /// x86-64 with AVX2, F16C and BMI2.
    #[non_exhaustive]
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// As [`Isa::Avx2`], and AVX-512 F, BW, VL, VBMI, BF16 and VPOPCNTDQ, and GFNI: Zen 4, Sapphire Rapids, and later.
    #[non_exhaustive]
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// aarch64.
    #[non_exhaustive]
    #[cfg(target_arch = "aarch64")]
    Neon,
}

impl Isa {
    /// The best that this CPU has.
    #[must_use]
    pub fn detect() -> Self {
        Self::supported().last().unwrap_or(Self::Scalar)
    }

    /// All that this CPU has, the best last.
    pub fn supported() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let vectors = [(Self::Avx2, has_avx2()), (Self::Avx512, has_avx2() && has_avx512())];
        #[cfg(target_arch = "aarch64")]
        let vectors = [(Self::Neon, std::arch::is_aarch64_feature_detected!("neon"))];
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let vectors = [];
        let vectors = vectors.into_iter().filter(|&(_, supported)| supported).map(|(isa, _)| isa);
        std::iter::once(Self::Scalar).chain(vectors)
    }

    /// The name used by metrics and tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "aarch64")]
            Self::Neon => "neon",
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("f16c")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("popcnt")
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vbmi")
        && is_x86_feature_detected!("avx512bf16")
        && is_x86_feature_detected!("avx512vpopcntdq")
        && is_x86_feature_detected!("gfni")
}
