// Apply SpargeAttn shows its preset first and what experts turn last. A preset writes its values into other widgets;
// turning one of these makes it custom.
//
// Files keep the widgets in the order of the node's definition, where preset is last. So they mean the same to an
// editor without this script, and a file from before there were presets, which lacks the last values, loads as custom.
import { app } from "../../scripts/app.js"

const NODE = "ApplySpargeAttn"
const PRESET = "preset", CUSTOM = "custom"
let inputs, presets, ofNewNode, names // from the node's definition; names: of the widgets that a preset sets

const find = (node, name) => node.widgets.find(widget => widget.name === name)

// Whether widgets in another, whose names follow a dot, have their place behind it.
function place(widget) {
  const index = Object.keys(inputs).indexOf(widget.name.split(".")[0])
  return index < 0 ? Infinity : index
}

function shownPlace(widget) {
  const behind = place(widget) === Infinity ? 2 : widget.options?.advanced ? 1 : 0
  return widget.name === PRESET ? -1 : behind
}

const asInFiles = (a, b) => Math.sign(place(a) - place(b)) || 0
const asShown = (a, b) => shownPlace(a) - shownPlace(b) || asInFiles(a, b)

function sort(node, order) {
  node.widgets.splice(0, node.widgets.length, ...[...node.widgets].sort(order))
}

function set(node, values) {
  for (const [name, value] of Object.entries(values)) {
    const widget = find(node, name)
    if (widget && widget.value !== value) widget.value = value
  }
}

// A choice of selection makes the widgets in it anew.
function watch(node) {
  for (const name of [PRESET, ...names]) {
    const widget = find(node, name), { callback } = widget ?? {}
    if (!widget || callback?.watched) continue
    widget.callback = function (...turned) {
      const result = callback?.apply(this, turned)
      if (name === PRESET) show(node)
      else if (Object.entries(presets[find(node, PRESET).value] ?? {}).some(
        ([name, value]) => find(node, name)?.value !== value)) makeCustom(node)
      watch(node)
      return result
    }
    widget.callback.watched = true
  }
}

function show(node) {
  set(node, presets[find(node, PRESET).value] ?? {})
  watch(node)
  app.canvas?.setDirty(true, true)
}

function makeCustom(node) {
  find(node, PRESET).value = CUSTOM
  app.canvas?.setDirty(true, true)
}

// What a file or a prompt lacks has the definition's value, not that of a new node.
function reset(node, names) {
  set(node, Object.fromEntries(names.flatMap(name => {
    const value = inputs[name]?.[1].default
    return value === undefined ? [] : [[name, value]]
  })))
}

function extend(prototype) {
  const { configure, onSerialize, onConnectionsChange } = prototype
  prototype.configure = function (info) {
    if (info.widgets_values?.length) reset(this, [PRESET, ...names])
    sort(this, asInFiles)
    configure.call(this, info)
    sort(this, asShown)
    show(this)
  }
  prototype.onSerialize = function (info) {
    onSerialize?.call(this, info)
    const kept = this.widgets.filter(widget => widget.serialize !== false)
    info.widgets_values = kept.sort(asInFiles).map(widget => info.widgets_values[this.widgets.indexOf(widget)])
  }
  prototype.onConnectionsChange = function (side, slot, connected, link, input, ...rest) {
    onConnectionsChange?.call(this, side, slot, connected, link, input, ...rest)
    if (connected && link && names.includes(input?.name)) makeCustom(this)
  }
}

app.registerExtension({
  name: "SpargeAttn.presets",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== NODE) return
    inputs = { ...nodeData.input.required, ...nodeData.input.optional };
    ({ presets, of_a_new_node: ofNewNode } = inputs[PRESET][1])
    names = Object.keys(presets[ofNewNode])
    extend(nodeType.prototype)
  },
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return
    sort(node, asShown)
    find(node, PRESET).value = ofNewNode
    show(node)
  },
  // The editor opens a prompt as new nodes that it gives the prompt's values.
  setup() {
    const { loadApiJson } = app
    app.loadApiJson = async function (prompt, ...rest) {
      await loadApiJson.call(this, prompt, ...rest)
      for (const [id, { class_type, inputs: values }] of Object.entries(prompt)) {
        const node = class_type === NODE && app.graph.getNodeById(isNaN(id) ? id : Number(id))
        if (!node) continue
        reset(node, [PRESET, ...names].filter(name => !(name in values)))
        show(node)
      }
    }
  }
})
