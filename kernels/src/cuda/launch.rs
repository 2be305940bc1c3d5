//! Launching kernels.

use std::ffi::c_void;
use std::ptr::null_mut;

use cudarc::driver::sys::{self, CUlaunchAttributeID as Id};

use super::context::{Context, Function, check};

/// Most parameters of a kernel.
const MAX_PARAMETERS: usize = 32;

/// The shape of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Launch {
    /// Blocks, x, y, z.
    pub(crate) grid: [u32; 3],
    /// Threads of a block, x, y, z.
    pub(crate) block: [u32; 3],
    /// Blocks of a cluster, x, y, z; each divides the grid's.
    pub(crate) cluster: [u32; 3],
    /// Dynamic shared memory of a block, in bytes.
    pub(crate) shared_bytes: u32,
    /// Programmatic dependent launch: the kernel may start while the one before it still runs. It executes
    /// `griddepcontrol.wait` before it reads what others wrote or writes what they read.
    pub(crate) dependent: bool,
}

impl Launch {
    /// `grid` blocks of `threads` threads, in a row, as a dependent launch.
    pub(crate) fn new(grid: u32, threads: u32) -> Self {
        Self { grid: [grid, 1, 1], block: [threads, 1, 1], cluster: [1; 3], shared_bytes: 0, dependent: true }
    }

    /// With this grid.
    pub(crate) fn grid(self, grid: [u32; 3]) -> Self {
        Self { grid, ..self }
    }

    /// With clusters of this many blocks along x.
    pub(crate) fn cluster(self, blocks: u32) -> Self {
        Self { cluster: [blocks, 1, 1], ..self }
    }

    /// With this much dynamic shared memory per block.
    pub(crate) fn shared(self, bytes: u32) -> Self {
        Self { shared_bytes: bytes, ..self }
    }

    /// Starts only when everything before has ended: for kernels without `griddepcontrol.wait`.
    pub(crate) fn after_everything(self) -> Self {
        Self { dependent: false, ..self }
    }
}

/// A value that kernels take: an address, a number, or a structure of them with C's layout.
///
/// # Safety
/// The type is plain data with the layout of the kernel's parameter.
pub(crate) unsafe trait Argument {
    /// Bytes of the parameter.
    fn size(&self) -> usize {
        size_of_val(self)
    }

    /// Where the value is.
    fn address(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }
}

macro_rules! plain_arguments {
    ($($type:ty),*) => { $(
        // SAFETY: a number has the same layout in Rust and C.
        unsafe impl Argument for $type {}
    )* };
}
plain_arguments!(u8, i32, u32, i64, u64, f32);

// SAFETY: declared by the driver's own header.
unsafe impl Argument for sys::CUtensorMap {}

impl Context {
    /// Launches `function` on the context's stream.
    ///
    /// # Safety
    /// `arguments` are what the kernel takes, and every address among them is of device memory that the kernel may
    /// use as it does, until it has run.
    ///
    /// # Panics
    /// `arguments` differ from the kernel's parameters in number or size, or the driver refuses the launch.
    pub(crate) unsafe fn launch(&self, function: &Function, launch: &Launch, arguments: &[&dyn Argument]) {
        let Function { raw, name, parameters } = function;
        assert!(
            arguments.len() == parameters.len() && arguments.len() <= MAX_PARAMETERS,
            "{name} takes {} arguments, not {}",
            parameters.len(),
            arguments.len()
        );
        let mut addresses = [null_mut(); MAX_PARAMETERS];
        for (index, (argument, &size)) in arguments.iter().zip(parameters).enumerate() {
            let given = argument.size();
            assert!(given == size, "argument {index} of {name} has {size} bytes, not {given}");
            addresses[index] = argument.address();
        }
        let mut attributes = [attribute(Id::CU_LAUNCH_ATTRIBUTE_IGNORE); 2];
        let mut count = 0;
        if launch.cluster != [1; 3] {
            let [x, y, z] = launch.cluster;
            attributes[count] = attribute(Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
            attributes[count].value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y, z };
            count += 1;
        }
        if launch.dependent {
            attributes[count] = attribute(Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
            attributes[count].value.programmaticStreamSerializationAllowed = 1;
            count += 1;
        }
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.block[0],
            blockDimY: launch.block[1],
            blockDimZ: launch.block[2],
            sharedMemBytes: launch.shared_bytes,
            hStream: self.stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: count as u32,
        };
        // SAFETY: the arguments fit the parameters, as checked above, and the rest is the caller's promise; the driver
        // copies arguments and attributes before it returns.
        let result =
            unsafe { sys::cuLaunchKernelEx(&raw const config, *raw, addresses.as_mut_ptr(), null_mut()) };
        check(result, name);
    }

    /// Clusters of `launch`'s size and shared memory that the device runs at once; 0 if it cannot run one.
    pub(crate) fn most_clusters(&self, function: &Function, launch: &Launch) -> usize {
        let [x, y, z] = launch.cluster;
        let mut attribute = attribute(Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
        attribute.value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y, z };
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.block[0],
            blockDimY: launch.block[1],
            blockDimZ: launch.block[2],
            sharedMemBytes: launch.shared_bytes,
            hStream: self.stream(),
            attrs: &raw mut attribute,
            numAttrs: 1,
        };
        let mut clusters = 0;
        // SAFETY: reads the configuration and writes to a local variable.
        let result =
            unsafe { sys::cuOccupancyMaxActiveClusters(&raw mut clusters, function.raw, &raw const config) };
        if result == sys::CUresult::CUDA_SUCCESS { clusters as usize } else { 0 }
    }
}

/// An attribute whose value is zero.
fn attribute(id: Id) -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute { id, pad: [0; 4], value: sys::CUlaunchAttributeValue { pad: [0; 64] } }
}
