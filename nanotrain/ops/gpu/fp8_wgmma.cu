// D = A B^T for Hopper's tensor cores: A in FP8 tiles (1 x 128 along the reduction), B in such tiles (the gradient of a
// weight) or in blocks of 128 x 128 (outputs, gradients of inputs). Formats and scales: ops/fp8.py.
//
// A block of three warpgroups makes 256 x 128 results at a time. The first one brings A, B and their scales into a ring in
// shared memory, 128 columns a stage; the other two multiply, 128 rows each. Two blocks form a cluster and have the same rows
// of A, of which each brings one half for both. The tensor cores add 128 terms, then the scales are applied and the parts
// added in fp32 in the order of the reduction: the same bits as cuBLASLt's.
//
// What limits it is that second addition, not the tensor cores: an instruction beside the multiplications and additions of
// the parts costs time wherever it is (docs/benchmarks/one_gpu_h200_202611.md).
//
// Macros: B_BLOCKS (B has blocks), OUT_FLOAT (results in fp32 instead of bf16), SHARED_BYTES (what the launch gives a block).

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int ROWS = 256, COLUMNS = 128, DEPTH = 128, STAGES = 4;
constexpr int CLUSTER = 2, WARPGROUP = 128, MULTIPLIERS = 2, WAVES = 2;  // a wave: 64 rows of a warpgroup
constexpr int GROUP = 8;                                                 // row tiles that clusters work on together
constexpr int A_BYTES = ROWS * DEPTH, B_BYTES = COLUMNS * DEPTH;

struct alignas(64) TensorMap {
  u64 opaque[16];
};

struct alignas(1024) Shared {
  unsigned char a[STAGES][A_BYTES];
  unsigned char b[STAGES][B_BYTES];
  float a_scales[STAGES][ROWS];
  float b_scales[STAGES][4][36];  // the 32 of a thread side by side; 36: no two rows share banks
  u64 full[STAGES];
  u64 empty[STAGES];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "fp8_wgmma.py has other sizes");

__device__ __forceinline__ u32 address(const void* shared) { return static_cast<u32>(__cvta_generic_to_shared(shared)); }

// Not plain accesses: the order of loads and waits must stay as it is written.
__device__ __forceinline__ float load_one(u32 at) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(at));
  return x;
}

__device__ __forceinline__ void load_four(float* to, u32 at) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3]) : "r"(at));
}

__device__ __forceinline__ void wait(u64* barrier, u32 parity) {
  asm volatile(
      "{\n .reg .pred done;\n"
      "again:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n @done bra over;\n bra again;\n"
      "over:\n}"
      ::"r"(address(barrier)), "r"(parity) : "memory");
}

__device__ __forceinline__ void arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}

__device__ __forceinline__ void arrive_and_expect(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory");
}

// The same place in a block of the cluster.
__device__ __forceinline__ u32 address_in(u32 block, const void* shared) {
  u32 there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(shared)), "r"(block));
  return there;
}

__device__ __forceinline__ void arrive_at(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void bring_tile(void* to, const TensorMap& map, int column, int row, u64* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      ::"r"(address(to)), "l"(&map), "r"(column), "r"(row), "r"(address(barrier)) : "memory");
}

__device__ __forceinline__ void bring_tile_to_both(void* to, const TensorMap& map, int column, int row, u64* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;"
      ::"r"(address(to)), "l"(&map), "r"(column), "r"(row), "r"(address(barrier)), "h"((unsigned short)3) : "memory");
}

__device__ __forceinline__ void bring_row(void* to, const float* from, u32 bytes, u64* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      ::"r"(address(to)), "l"(from), "r"(bytes), "r"(address(barrier)) : "memory");
}

__device__ __forceinline__ u32 rank_in_cluster() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Rows of 128 bytes, swizzled in groups of eight rows.
__device__ __forceinline__ u64 descriptor(const void* tile) {
  return u64((address(tile) & 0x3FFFF) >> 4) | (u64(1) << 16) | (u64(64) << 32) | (u64(1) << 62);
}

#define F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F16(d, i) F4(d, i), F4(d, i + 4), F4(d, i + 8), F4(d, i + 12)

// part (+)= 64 x 32 of A times 128 x 32 of B.
__device__ __forceinline__ void multiply(float (&part)[64], u64 a, u64 b, int add) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1;\n}"
      : F16(part, 0), F16(part, 16), F16(part, 32), F16(part, 48)
      : "l"(a), "l"(b), "r"(add));
}

// The registers of a product that runs: the compiler moves no use of them over this line.
__device__ __forceinline__ void hold(float (&part)[64]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(part[i])::"memory");
}

struct Tile {
  int row, column;
};

// Clusters that run at the same time share rows of A and columns of B in the L2 cache.
__device__ __forceinline__ Tile tile_of(int index, int row_tiles, int pairs, u32 rank) {
  const int together = GROUP * pairs, first = index / together * GROUP, inside = index % together;
  const int height = min(GROUP, row_tiles - first);
  return {(first + inside % height) * ROWS, (inside / height * CLUSTER + int(rank)) * COLUMNS};
}

__device__ __forceinline__ u32 rounded_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Lane k's word i goes to lane i's word k, within each four lanes.
__device__ __forceinline__ void transpose_four(u32 (&w)[4], int lane) {
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const u32 other = __shfl_xor_sync(~0u, odd ? w[i] : w[i + 1], 1);
    if (odd) w[i] = other; else w[i + 1] = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const u32 other = __shfl_xor_sync(~0u, upper ? w[i] : w[i + 2], 2);
    if (upper) w[i] = other; else w[i + 2] = other;
  }
}

// Writes 64 x 128 results, of which a thread has two rows: `row` and eight below.
__device__ __forceinline__ void write(const float (&sum)[64], void* out, int row, int column, int rows, int columns, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = row + 8 * half;
#ifdef OUT_FLOAT
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const int c = column + 8 * j + 2 * (lane & 3);
      if (at < rows && c < columns)
        *reinterpret_cast<float2*>(static_cast<float*>(out) + u64(at) * columns + c) =
            make_float2(sum[4 * j + 2 * half], sum[4 * j + 2 * half + 1]);
    }
#else
#pragma unroll
    for (int j = 0; j < 16; j += 4) {  // four blocks of eight columns: each lane of four writes one of them
      u32 words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        words[i] = rounded_pair(sum[4 * (j + i) + 2 * half], sum[4 * (j + i) + 2 * half + 1]);
      transpose_four(words, lane);
      const int c = column + 8 * (j + (lane & 3));
      if (at < rows && c < columns)
        *reinterpret_cast<uint4*>(static_cast<unsigned short*>(out) + u64(at) * columns + c) =
            make_uint4(words[0], words[1], words[2], words[3]);
    }
#endif
  }
}

// A thread's part of a product is scaled and added up.
__device__ __forceinline__ void add_scaled(float (&total)[64], const float (&part)[64], float upper, float lower,
                                           const float (&scales)[32]) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const float left = B_BLOCKS ? 1.0f : scales[2 * j], right = B_BLOCKS ? 1.0f : scales[2 * j + 1];
    total[4 * j] += upper * left * part[4 * j];
    total[4 * j + 1] += upper * right * part[4 * j + 1];
    total[4 * j + 2] += lower * left * part[4 * j + 2];
    total[4 * j + 3] += lower * right * part[4 * j + 3];
  }
}

__device__ __forceinline__ void make_barriers(Shared& shared) {
  for (int s = 0; s < STAGES; ++s) {
    const u32 bringers = B_BLOCKS ? 1 : 2, readers = MULTIPLIERS * 4 * CLUSTER;
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(&shared.full[s])), "r"(bringers));
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(&shared.empty[s])), "r"(readers));
  }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// The whole product, and which tiles of it are a block's own: from the first one on, every `clusters`-th.
struct Work {
  int rows, columns, blocks;
  u32 rank;
  int row_tiles, pairs, first, clusters, tiles;

  __device__ __forceinline__ Tile tile(int index) const { return tile_of(index, row_tiles, pairs, rank); }
};

// One thread brings A, B and the scales of A's rows.
__device__ __forceinline__ void bring_tiles(Shared& shared, const Work& work, const TensorMap& a_map, const TensorMap& b_map,
                                            const float* a_scales, int a_stride) {
  u32 parities = ~0u;  // a bit for each stage; a tile begins with the first
  for (int index = work.first; index < work.tiles; index += work.clusters) {
    const Tile tile = work.tile(index);
    const u32 a_bytes = min(ROWS, work.rows - tile.row) * 4;
    for (int block = 0; block < work.blocks; ++block) {
      const int stage = block % STAGES;
      u64* full = &shared.full[stage];
      wait(&shared.empty[stage], parities >> stage & 1);
      parities ^= 1 << stage;
      arrive_and_expect(full, A_BYTES + B_BYTES + a_bytes);
      unsigned char* half = shared.a[stage] + work.rank * (A_BYTES / CLUSTER);
      bring_tile_to_both(half, a_map, block * DEPTH, tile.row + int(work.rank) * (ROWS / CLUSTER), full);
      bring_tile(shared.b[stage], b_map, block * DEPTH, tile.column, full);
      bring_row(shared.a_scales[stage], a_scales + u64(block) * a_stride + tile.row, a_bytes, full);
    }
  }
}

// One warp brings the scales of B's tiles: a lane those of four columns, two for each of two threads' rows of them.
__device__ __forceinline__ void bring_column_scales(Shared& shared, const Work& work, const float* b_scales, int b_stride,
                                                    int lane) {
  u32 parities = ~0u;
  for (int index = work.first; index < work.tiles; index += work.clusters) {
    const int column = work.tile(index).column + 4 * lane;
    const float4* from = reinterpret_cast<const float4*>(b_scales + column);
    float4 next = column < work.columns ? __ldg(from) : float4{};
    for (int block = 0; block < work.blocks; ++block) {
      const int stage = block % STAGES;
      const float4 scale = next;
      from += b_stride / 4;
      if (column < work.columns && block + 1 < work.blocks) next = __ldg(from);
      wait(&shared.empty[stage], parities >> stage & 1);
      parities ^= 1 << stage;
      float2* to = reinterpret_cast<float2*>(shared.b_scales[stage][2 * (lane & 1)]) + lane / 2;
      to[0] = make_float2(scale.x, scale.y);
      to[18] = make_float2(scale.z, scale.w);
      __syncwarp();
      if (lane == 0) arrive(&shared.full[stage]);
    }
  }
}

// A warpgroup multiplies, and writes its results.
__device__ __forceinline__ void multiply_tiles(Shared& shared, const Work& work, const float* b_scales, int b_stride, void* out,
                                               int warpgroup, int warp, int lane) {
  const int own_rows = (warpgroup - 1) * 64 * WAVES, own_row = own_rows + warp * 16 + lane / 4;
  u32 first_a_scale = address(&shared.a_scales[0][own_row]), first_b_scale = address(shared.b_scales[0][lane & 3]);
  u32 first_empty = address_in(lane & (CLUSTER - 1), &shared.empty[0]);
  asm volatile("" : "+r"(first_a_scale), "+r"(first_b_scale), "+r"(first_empty));  // kept, not made again
  const u64 own_a = descriptor(shared.a[0] + own_rows * DEPTH), own_b = descriptor(shared.b[0]);
  u32 parities = 0;
  for (int index = work.first; index < work.tiles; index += work.clusters) {
    const Tile tile = work.tile(index);
    const float* block_scales = b_scales + u64(min(tile.column, work.columns - 1) / COLUMNS) * b_stride;
    float total[WAVES][64] = {};
    for (int left = work.blocks; left > 0; left -= STAGES) {
#pragma unroll
      for (int stage = 0; stage < STAGES; ++stage) {  // known to the compiler, which then computes no addresses
        if (stage >= left) break;
        const float block_scale = B_BLOCKS ? __ldg(block_scales + stage) : 1.0f;
        wait(&shared.full[stage], parities >> stage & 1);
        const u32 a_scale = first_a_scale + stage * u32(sizeof shared.a_scales[0]);
        const u32 b_scale = first_b_scale + stage * u32(sizeof shared.b_scales[0]);
        float scales[32];  // of this thread's columns; the waves share them
#pragma unroll
        for (int wave = 0; wave < WAVES; ++wave) {
          const u64 a = own_a + ((stage * A_BYTES + wave * 64 * DEPTH) >> 4), b = own_b + (stage * B_BYTES >> 4);
          float part[64];
          hold(part);
          asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
          for (int k = 0; k < 4; ++k) multiply(part, a + 2 * k, b + 2 * k, k);
          asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
          const float upper = load_one(a_scale + wave * 256) * block_scale;
          const float lower = load_one(a_scale + wave * 256 + 32) * block_scale;
          if (!B_BLOCKS && wave == 0) {
#pragma unroll
            for (int i = 0; i < 8; ++i) load_four(scales + 4 * i, b_scale + 16 * i);
          }
          asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
          hold(part);
          add_scaled(total[wave], part, upper, lower, scales);
        }
        __syncwarp();
        if (lane < CLUSTER) arrive_at(first_empty + stage * 8);  // the other block's half of A lies here too
      }
      parities ^= (1 << min(left, STAGES)) - 1;
      block_scales += STAGES;
    }
#pragma unroll
    for (int wave = 0; wave < WAVES; ++wave)
      write(total[wave], out, tile.row + own_row + wave * 64, tile.column, work.rows, work.columns, lane);
  }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(WARPGROUP * (1 + MULTIPLIERS), 1)
    fp8_product(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
                const float* __restrict__ a_scales, const float* __restrict__ b_scales, void* __restrict__ out, int rows,
                int columns, int blocks, int a_stride, int b_stride) {
  extern __shared__ Shared memory[];  // at a multiple of 1024 bytes, as the swizzle needs it
  Shared& shared = memory[0];
  const u32 rank = rank_in_cluster();
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0);  // known to be the same in all lanes
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int row_tiles = (rows + ROWS - 1) / ROWS, pairs = (columns + CLUSTER * COLUMNS - 1) / (CLUSTER * COLUMNS);
  const int first = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER, tiles = row_tiles * pairs;
  const Work work = {rows, columns, blocks, rank, row_tiles, pairs, first, clusters, tiles};
  if (threadIdx.x == 0) make_barriers(shared);
  meet_cluster();

  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) bring_tiles(shared, work, a_map, b_map, a_scales, a_stride);
    if (!B_BLOCKS && warp == 1) bring_column_scales(shared, work, b_scales, b_stride, lane);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    multiply_tiles(shared, work, b_scales, b_stride, out, warpgroup, warp, lane);
  }
  meet_cluster();  // a block that is through still is the other's destination
}
