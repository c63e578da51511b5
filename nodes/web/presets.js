// Apply SpargeAttn shows its preset first and its advanced widgets last. A preset writes its values into other widgets;
// turning one of these makes it custom.
//
// Files keep the widgets in the order of the node's definition, where preset is the last one. So they mean the same to
// an editor without this script, and a file from before there were presets, which lacks the last values, is custom.
import { app } from "../../scripts/app.js"

const NODE = "ApplySpargeAttn", PRESET = "preset", CUSTOM = "custom"
// From the node's definition: its inputs, {preset: {widget: value}}, the preset of a new node, {widget: value} of what
// has no preset, and the names of all widgets that presets set. Those inside selection come and go with its choice.
let inputs, presets, ofNewNode, without, names

const find = (node, name) => node.widgets.find(widget => widget.name === name)

// A widget inside another, such as selection.cdf_threshold, has the place of that.
function placeInFiles(widget) {
  const place = Object.keys(inputs).indexOf(widget.name.split(".")[0])
  return place < 0 ? Infinity : place // the editor's own
}

function placeOnNode(widget) {
  if (widget.name === PRESET) return -1
  return (widget.options?.advanced ? 100 : 0) + placeInFiles(widget)
}

const sorted = (widgets, place) => [...widgets].sort((a, b) => place(a) - place(b) || 0)

function sort(node, place) {
  node.widgets.splice(0, node.widgets.length, ...sorted(node.widgets, place))
}

// A new node may show the selection of a removed one that had its number, over the widgets of another choice. Setting
// the same choice again makes those that belong to it.
function set(node, values) {
  for (const [name, value] of Object.entries(values)) {
    const widget = find(node, name)
    const whole = Object.keys(values).every(inner => !inner.startsWith(`${name}.`) || find(node, inner))
    if (widget && !(whole && widget.value === value)) widget.value = value
  }
}

function choose(node, preset) {
  find(node, PRESET).value = preset
  set(node, presets[preset] ?? {})
  watch(node)
  app.canvas?.setDirty(true, true)
}

function turned(node) {
  const values = presets[find(node, PRESET).value] ?? {}
  const kept = Object.entries(values).every(([name, value]) => find(node, name)?.value === value)
  if (!kept) choose(node, CUSTOM)
  else watch(node)
}

// Again after every change of selection, which makes the widgets inside it anew.
function watch(node) {
  for (const name of [PRESET, ...names]) {
    const widget = find(node, name)
    if (!widget || widget.callback?.watched) continue
    const { callback } = widget
    widget.callback = function (value, ...rest) {
      const result = callback?.call(this, value, ...rest)
      if (name === PRESET) choose(node, value)
      else turned(node)
      return result
    }
    widget.callback.watched = true
  }
}

// What a file or a prompt lacks has the value that it means there, not that of a new node.
function reset(node, given) {
  const lacking = Object.entries({ ...without, [PRESET]: CUSTOM }).filter(([name]) => !(name in given))
  set(node, Object.fromEntries(lacking))
}

function extend(prototype) {
  const { configure, onSerialize, onConnectionsChange } = prototype
  prototype.configure = function (info) {
    if (info.widgets_values?.length) reset(this, {})
    sort(this, placeInFiles)
    configure.call(this, info)
    sort(this, placeOnNode)
    choose(this, find(this, PRESET).value)
  }
  prototype.onSerialize = function (info) {
    onSerialize?.call(this, info)
    const kept = sorted(this.widgets, placeInFiles).filter(widget => widget.serialize !== false)
    info.widgets_values = kept.map(widget => info.widgets_values[this.widgets.indexOf(widget)])
  }
  prototype.onConnectionsChange = function (side, slot, connected, link, input, ...rest) {
    onConnectionsChange?.call(this, side, slot, connected, link, input, ...rest)
    if (connected && link && names.includes(input?.name)) choose(this, CUSTOM)
  }
}

app.registerExtension({
  name: "SpargeAttn.presets",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== NODE) return
    inputs = { ...nodeData.input.required, ...nodeData.input.optional };
    ({ presets, of_a_new_node: ofNewNode, without } = inputs[PRESET][1])
    names = Object.keys(Object.assign({}, ...Object.values(presets)))
    extend(nodeType.prototype)
  },
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return
    sort(node, placeOnNode)
    choose(node, ofNewNode)
  },
  // The editor opens a prompt as new nodes, to which it gives the prompt's values.
  setup() {
    const { loadApiJson } = app
    app.loadApiJson = async function (prompt, ...rest) {
      await loadApiJson.call(this, prompt, ...rest)
      for (const [id, { class_type, inputs: given }] of Object.entries(prompt)) {
        const node = class_type === NODE && app.graph.getNodeById(isNaN(id) ? id : Number(id))
        if (!node) continue
        reset(node, given)
        choose(node, presets[given[PRESET]] ? given[PRESET] : CUSTOM)
      }
    }
  }
})
