//! The form in which activations wait for the products that read them.

use crate::mx::Cast;
#[cfg(feature = "cuda")]
use crate::mx::{Rotation, Scheme};

/// What a scheme declares to be done to the input of a product before it multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preparation {
    /// Each block of 32 times the Hadamard matrix over the square root of 32, first.
    pub(crate) is_rotated: bool,
    /// Then the values of this format.
    pub(crate) activation: Option<Cast>,
}

#[cfg(feature = "cuda")]
impl Preparation {
    /// What `scheme` declares; `None` if the input multiplies as it is.
    pub(crate) fn of(scheme: Option<Scheme>) -> Option<Self> {
        let Scheme { activation, rotation, .. } = scheme?;
        let is_rotated = match rotation {
            None => false,
            Some(Rotation::BlockHadamard) => true,
        };
        (is_rotated || activation.is_some()).then_some(Self { is_rotated, activation })
    }
}

/// How an operator leaves activations for the products that follow, so that these need no pass of their own to prepare
/// them: asked of [`Backend::input_form`](crate::Backend::input_form), given to the operator, and kept with the buffer,
/// where products look. The result is the same in every form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum InputForm {
    /// As they were computed.
    #[default]
    Plain,
    /// Prepared, in the activations' element type, which has every value of every MX format.
    Prepared(Preparation),
    /// Prepared, as E4M3 numbers of one byte, in the order in which a device multiplies them, and then a factor for each
    /// row.
    E4m3(Preparation),
}
